#include "data/column.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace graft::data {
namespace {

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

Column::Column(Hdf5Handle dataset, hid_t type, int descriptor)
    : dataset_(std::move(dataset)),
      type_(type),
      width_(H5Tget_size(type)),
      descriptor_(descriptor) {
  Hdf5Lock lock;
  const Hdf5Handle properties(H5Dget_create_plist(dataset_.get()), H5Pclose);
  const Hdf5Handle space(H5Dget_space(dataset_.get()), H5Sclose);
  hsize_t size = 0, chunk = 0;
  if (H5Sget_simple_extent_dims(space.get(), &size, nullptr) != 1 || size == 0) return;
  if (has_user_block(dataset_.get()) || !is_plain(dataset_.get(), properties.get(), type)) return;
  const H5D_layout_t layout = H5Pget_layout(properties.get());
  if (layout == H5D_CHUNKED && H5Pget_chunk(properties.get(), 1, &chunk) == 1) {
    chunk_elements_ = chunk;
    addresses_.resize((size + chunk - 1) / chunk, 0);
  } else if (layout == H5D_CONTIGUOUS) {  // one piece, with no checksum to verify
    const haddr_t address = H5Dget_offset(dataset_.get());
    if (address == HADDR_UNDEF) return;
    chunk_elements_ = size;
    addresses_ = {address};
  }
}

std::string Column::read(uint64_t begin, uint64_t count, void* out) {
  if (addresses_.empty()) return read_by_library(begin, count, out);
  char* to = static_cast<char*>(out);
  while (count > 0) {
    const uint64_t chunk = begin / chunk_elements_, inside = begin % chunk_elements_;
    const uint64_t part = std::min(count, chunk_elements_ - inside);
    const uint64_t address = addresses_[chunk];
    std::string failure = address ? read_directly(address + inside * width_, part, to)
                                  : read_by_library(begin, part, to);
    if (!failure.empty()) return failure;
    if (!address) learn_address(chunk);
    begin += part;
    count -= part;
    to += part * width_;
  }
  return "";
}

std::string Column::read_by_library(uint64_t begin, uint64_t count, void* out) const {
  const hsize_t start = begin, size = count;
  const Hdf5Handle memory(H5Screate_simple(1, &size, nullptr), H5Sclose);
  const Hdf5Handle space(H5Dget_space(dataset_.get()), H5Sclose);
  const bool read =
      H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, &start, nullptr, &size, nullptr) >= 0 &&
      H5Dread(dataset_.get(), type_, memory.get(), space.get(), H5P_DEFAULT, out) >= 0;
  return read ? "" : hdf5_message();
}

std::string Column::read_directly(uint64_t address, uint64_t count, void* out) const {
  char* to = static_cast<char*>(out);
  for (uint64_t left = count * width_; left > 0;) {
    const ssize_t got = ::pread(descriptor_, to, left, static_cast<off_t>(address));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return got < 0 ? std::strerror(errno) : "the file ends early";
    address += got;
    to += got;
    left -= got;
  }
  return "";
}

void Column::learn_address(uint64_t chunk) {
  const hsize_t start = chunk * chunk_elements_;
  unsigned skipped_filters = 0;
  haddr_t address = HADDR_UNDEF;
  hsize_t bytes = 0;
  const bool found =
      H5Dget_chunk_info_by_coord(dataset_.get(), &start, &skipped_filters, &address, &bytes) >= 0;
  if (found && address != HADDR_UNDEF && bytes >= chunk_elements_ * width_)
    addresses_[chunk] = address;
}

}  // namespace graft::data
