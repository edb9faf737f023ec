#include "data/column.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>

#include "data/scan.h"

namespace graft::data {
namespace {

/// To find a chunk, libhdf5 1.10 walks over all that come before it (about 40 ns each).
constexpr uint64_t kMaxChunks = 4096;

/// Do the bytes of a chunk in the file equal the numbers in memory, but for a checksum after them?
bool is_plain(hid_t dataset, hid_t properties, hid_t type) {
  const Hdf5Handle stored(H5Dget_type(dataset), H5Tclose);
  if (H5Tequal(stored.get(), type) <= 0) return false;
  const int num_filters = H5Pget_nfilters(properties);
  if (num_filters == 0) return true;
  unsigned flags = 0, config = 0;
  size_t num_values = 0;
  return num_filters == 1 && H5Pget_filter2(properties, 0, &flags, &num_values, nullptr, 0, nullptr,
                                            &config) == H5Z_FILTER_FLETCHER32;
}

/// Addresses count from the end of a user block, which no shard of ours has.
bool has_user_block(hid_t dataset) {
  const Hdf5Handle file(H5Iget_file_id(dataset), H5Fclose);
  const Hdf5Handle properties(H5Fget_create_plist(file.get()), H5Pclose);
  hsize_t bytes = 0;
  return H5Pget_userblock(properties.get(), &bytes) < 0 || bytes > 0;
}

}  // namespace

template <class Number>
Column<Number>::Column(Hdf5Handle dataset, int64_t limit, int descriptor)
    : dataset_(std::move(dataset)),
      reader_(dataset_.get(), native_type<Number>()),
      limit_(limit),
      descriptor_(descriptor) {
  Hdf5Lock lock;
  const Hdf5Handle properties(H5Dget_create_plist(dataset_.get()), H5Pclose);
  const Hdf5Handle space(H5Dget_space(dataset_.get()), H5Sclose);
  hsize_t size = 0, chunk = 0;
  if (H5Sget_simple_extent_dims(space.get(), &size, nullptr) != 1 || size == 0) return;
  if (has_user_block(dataset_.get()) ||
      !is_plain(dataset_.get(), properties.get(), native_type<Number>()))
    return;
  const H5D_layout_t layout = H5Pget_layout(properties.get());
  if (layout == H5D_CHUNKED && H5Pget_chunk(properties.get(), 1, &chunk) == 1) {
    const uint64_t num_chunks = (size - 1) / chunk + 1;
    if (num_chunks > kMaxChunks) return;
    chunk_elements_ = chunk;
    has_checksums_ = H5Pget_nfilters(properties.get()) == 1;
    chunks_.resize(num_chunks);
  } else if (layout == H5D_CONTIGUOUS) {  // one piece, with no checksum to verify
    const haddr_t address = H5Dget_offset(dataset_.get());
    if (address == HADDR_UNDEF) return;
    chunk_elements_ = size;
    chunks_ = {{address, false}};
  }
}

template <class Number>
std::string Column<Number>::read(uint64_t begin, std::span<Number> out, bool& sound) {
  if (chunks_.empty()) {
    sound = false;
    return reader_.read(begin, out.size(), out.data());
  }
  while (!out.empty()) {
    Chunk& chunk = chunks_[begin / chunk_elements_];
    const uint64_t inside = begin % chunk_elements_;
    const auto part = out.first(std::min<uint64_t>(out.size(), chunk_elements_ - inside));
    const bool read = chunk.address == 0 ? read_new_chunk(chunk, inside, part)
                                         : read_bytes(chunk.address + inside * sizeof(Number),
                                                      part.data(), part.size_bytes());
    sound = sound && read && chunk.sound;
    if (!read) {
      std::string failure = reader_.read(begin, part.size(), part.data());
      if (!failure.empty()) return failure;
    }
    begin += part.size();
    out = out.subspan(part.size());
  }
  return "";
}

/// Reads a part of a chunk, of which nothing was read before; verifies and remembers the chunk.
/// @return false: its bytes are not there as they should be
template <class Number>
bool Column<Number>::read_new_chunk(Chunk& chunk, uint64_t inside, std::span<Number> out) {
  const hsize_t start = (&chunk - chunks_.data()) * chunk_elements_;
  uint32_t checksum = 0;
  const uint64_t bytes = chunk_elements_ * sizeof(Number),
                 bytes_to_store = bytes + (has_checksums_ ? sizeof checksum : 0);
  unsigned skipped_filters = 0;
  haddr_t address = HADDR_UNDEF;
  hsize_t stored = 0;
  const bool found =
      H5Dget_chunk_info_by_coord(dataset_.get(), &start, &skipped_filters, &address, &stored) >= 0;
  if (!found || address == HADDR_UNDEF || skipped_filters != 0 || stored != bytes_to_store)
    return false;
  if (!has_checksums_) {
    chunk.address = address;
    return read_bytes(address + inside * sizeof(Number), out.data(), out.size_bytes());
  }
  std::unique_ptr<Number[]> elsewhere;
  if (out.size() < chunk_elements_)
    elsewhere = std::make_unique_for_overwrite<Number[]>(chunk_elements_);
  const std::span<Number> whole(elsewhere ? elsewhere.get() : out.data(), chunk_elements_);
  if (!read_bytes(address, whole.data(), bytes) ||
      !read_bytes(address + bytes, &checksum, sizeof checksum) ||
      fletcher32(std::as_bytes(whole)) != checksum)
    return false;
  if (elsewhere) std::copy_n(whole.begin() + inside, out.size(), out.begin());
  chunk = {address, checksum != 0 && all_below(whole, limit_)};
  return true;
}

template <class Number>
bool Column<Number>::read_bytes(uint64_t address, void* out, uint64_t bytes) const {
  char* to = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t got = ::pread(descriptor_, to, bytes, static_cast<off_t>(address));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    address += got;
    to += got;
    bytes -= got;
  }
  return true;
}

template class Column<uint32_t>;
template class Column<uint8_t>;

}  // namespace graft::data
