// Reads the elements of an HDF5 dataset at any place. libhdf5 never runs its filters here: it
// copies beyond the end of a chunk that decompresses to less than it should. Of filtered chunks it
// only fetches the bytes, and the filters are undone by our own code, with exact sizes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/hdf5.h"

namespace graft::data {

class DatasetReader {
 public:
  DatasetReader() = default;
  /// @param dataset      of one dimension, open as long as it is read; its filters are fletcher32,
  ///                     shuffle and at most one deflate
  /// @param memory_type  what its elements become: the stored type, or that with the other byte
  ///                     order
  DatasetReader(hid_t dataset, hid_t memory_type);

  /// Reads the elements from `begin` on, which must be inside. The caller holds an Hdf5Lock.
  /// @return why it failed; empty: it did not
  std::string read(uint64_t begin, uint64_t num_elements, void* out);

 private:
  struct Filter {
    H5Z_filter_t id;
    unsigned element_bytes;  // of shuffle
  };

  std::string read_by_library(uint64_t begin, uint64_t num_elements, void* out) const;
  std::string decode(uint64_t chunk);
  std::string fetch(uint64_t chunk, unsigned& skipped_filters);
  std::string undo(size_t filter, unsigned skipped_filters);

  hid_t dataset_ = H5I_INVALID_HID, memory_type_ = H5I_INVALID_HID;
  uint64_t num_elements_ = 0, chunk_elements_ = 0, element_bytes_ = 0;
  std::vector<Filter> filters_;  // in the order in which they were applied
  bool is_swapped_ = false;      // stored in the other byte order
  bool is_end_plain_ = false;    // filters were not applied to a chunk that is not full
  std::vector<char> bytes_;      // of the chunk that was read last
  uint64_t chunk_ = UINT64_MAX;  // its number
};

}  // namespace graft::data
