#include "data/dataset_reader.h"

#include <zlib.h>

#include <algorithm>
#include <cstring>
#include <span>

#include "configs/check.h"
#include "data/scan.h"

namespace graft::data {
namespace {

constexpr uint64_t kChecksumBytes = sizeof(uint32_t);

/// How much larger than its elements a chunk may be; filters that do not shrink one are skipped.
constexpr uint64_t kMaxOverheadBytes = 4096;

std::string undo_fletcher32(std::vector<char>& bytes) {
  if (bytes.size() < kChecksumBytes) return "it is too short for its checksum";
  uint32_t checksum = 0;
  std::memcpy(&checksum, bytes.data() + bytes.size() - kChecksumBytes, kChecksumBytes);
  bytes.resize(bytes.size() - kChecksumBytes);
  return fletcher32(std::as_bytes(std::span(bytes))) == checksum
             ? ""
             : "its Fletcher32 checksum does not agree: the file is damaged";
}

/// @param expected  how many bytes must come out
std::string undo_deflate(std::vector<char>& bytes, uint64_t expected) {
  std::vector<char> out(expected);
  uLongf size = expected;
  const int result = ::uncompress(reinterpret_cast<Bytef*>(out.data()), &size,
                                  reinterpret_cast<const Bytef*>(bytes.data()), bytes.size());
  if (result != Z_OK || size != expected)
    return detail::concat("it does not decompress to its ", expected,
                          " bytes: the file is damaged");
  bytes = std::move(out);
  return "";
}

/// Shuffled bytes: the first of each element, then the second of each, and so on; then the rest.
std::string undo_shuffle(std::vector<char>& bytes, uint64_t element_bytes) {
  if (element_bytes == 0) return "its shuffle filter has no element size";
  const uint64_t num_elements = bytes.size() / element_bytes;
  std::vector<char> out(bytes);
  for (uint64_t byte = 0; byte < element_bytes && num_elements > 0; ++byte)
    for (uint64_t element = 0; element < num_elements; ++element)
      out[element * element_bytes + byte] = bytes[byte * num_elements + element];
  bytes = std::move(out);
  return "";
}

}  // namespace

DatasetReader::DatasetReader(hid_t dataset, hid_t memory_type)
    : dataset_(dataset), memory_type_(memory_type) {
  Hdf5Lock lock;
  const Hdf5Handle properties(H5Dget_create_plist(dataset), H5Pclose);
  const int num_filters = H5Pget_nfilters(properties.get());
  hsize_t chunk = 0;
  if (num_filters <= 0 || H5Pget_chunk(properties.get(), 1, &chunk) != 1) return;
  const Hdf5Handle space(H5Dget_space(dataset), H5Sclose), type(H5Dget_type(dataset), H5Tclose);
  num_elements_ = H5Sget_simple_extent_npoints(space.get());
  element_bytes_ = H5Tget_size(type.get());
  is_swapped_ = H5Tget_order(type.get()) != H5Tget_order(memory_type);
  chunk_elements_ = chunk;
  unsigned options = 0;
  H5Pget_chunk_opts(properties.get(), &options);
  is_end_plain_ = (options & H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS) != 0;
  for (int i = 0; i < num_filters; ++i) {
    unsigned flags = 0, config = 0, element_bytes = 0;
    size_t num_values = 1;
    const auto id = H5Pget_filter2(properties.get(), i, &flags, &num_values, &element_bytes, 0,
                                   nullptr, &config);
    filters_.push_back({id, element_bytes});
  }
}

std::string DatasetReader::read(uint64_t begin, uint64_t num_elements, void* out) {
  if (filters_.empty()) return read_by_library(begin, num_elements, out);
  char* to = static_cast<char*>(out);
  while (num_elements > 0) {
    const uint64_t chunk = begin / chunk_elements_, inside = begin % chunk_elements_;
    const uint64_t part = std::min(num_elements, chunk_elements_ - inside);
    if (chunk != chunk_) {
      chunk_ = UINT64_MAX;
      const std::string failure = decode(chunk);
      if (!failure.empty()) return detail::concat("chunk ", chunk, ": ", failure);
      chunk_ = chunk;
    }
    to = std::copy_n(&bytes_[inside * element_bytes_], part * element_bytes_, to);
    begin += part;
    num_elements -= part;
  }
  return "";
}

std::string DatasetReader::decode(uint64_t chunk) {
  unsigned skipped_filters = 0;
  std::string failure = fetch(chunk, skipped_filters);
  for (size_t filter = filters_.size(); failure.empty() && filter-- > 0;)
    if ((skipped_filters >> filter & 1) == 0) failure = undo(filter, skipped_filters);
  if (!failure.empty()) return failure;
  const uint64_t expected = chunk_elements_ * element_bytes_;
  if (bytes_.size() != expected)
    return detail::concat("it has ", bytes_.size(), " bytes instead of ", expected);
  if (is_swapped_)
    for (auto at = bytes_.begin(); at != bytes_.end(); at += element_bytes_)
      std::reverse(at, at + element_bytes_);
  return "";
}

/// Takes the bytes of a chunk from the file as they are.
std::string DatasetReader::fetch(uint64_t chunk, unsigned& skipped_filters) {
  const hsize_t start = chunk * chunk_elements_;
  hsize_t stored = 0;
  if (H5Dget_chunk_storage_size(dataset_, &start, &stored) < 0) return hdf5_message();
  if (stored == 0) return "it is not in the file";
  if (stored > 2 * chunk_elements_ * element_bytes_ + kMaxOverheadBytes)
    return detail::concat("it claims ", stored, " bytes: the file is damaged");
  bytes_.resize(stored);
  if (H5Dread_chunk(dataset_, H5P_DEFAULT, &start, &skipped_filters, bytes_.data()) < 0)
    return hdf5_message();
  if (is_end_plain_ && start + chunk_elements_ > num_elements_) skipped_filters = ~0u;
  return "";
}

std::string DatasetReader::undo(size_t filter, unsigned skipped_filters) {
  const auto [id, element_bytes] = filters_[filter];
  if (id == H5Z_FILTER_FLETCHER32) return undo_fletcher32(bytes_);
  if (id == H5Z_FILTER_SHUFFLE) return undo_shuffle(bytes_, element_bytes);
  uint64_t deflated = chunk_elements_ * element_bytes_;  // and the checksums put on before
  for (size_t before = 0; before < filter; ++before)
    if (filters_[before].id == H5Z_FILTER_FLETCHER32 && (skipped_filters >> before & 1) == 0)
      deflated += kChecksumBytes;
  return undo_deflate(bytes_, deflated);
}

std::string DatasetReader::read_by_library(uint64_t begin, uint64_t num_elements, void* out) const {
  const hsize_t start = begin, size = num_elements;
  const Hdf5Handle memory(H5Screate_simple(1, &size, nullptr), H5Sclose);
  const Hdf5Handle space(H5Dget_space(dataset_), H5Sclose);
  const bool read =
      H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, &start, nullptr, &size, nullptr) >= 0 &&
      H5Dread(dataset_, memory_type_, memory.get(), space.get(), H5P_DEFAULT, out) >= 0;
  return read ? "" : hdf5_message();
}

}  // namespace graft::data
