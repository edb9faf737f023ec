// A column: a one-dimensional HDF5 dataset of numbers, read at any place and nearly as fast as the
// bare file. libhdf5 reads a chunk the first time, and so verifies its checksum; from then on its
// bytes are taken from the file itself. Reading a document of 1 KB through libhdf5 costs a chunk of
// 256 KB and its checksum each time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/hdf5.h"

namespace graft::data {

class Column {
 public:
  Column() = default;
  /// @param dataset     of one dimension
  /// @param type        of the numbers in memory, H5T_NATIVE_...
  /// @param descriptor  the file that holds it, open as long as the dataset is
  Column(Hdf5Handle dataset, hid_t type, int descriptor);

  /// Reads numbers [begin, begin + count), which must be inside. The caller holds an Hdf5Lock.
  /// @return why it failed; empty: it did not
  std::string read(uint64_t begin, uint64_t count, void* out);

 private:
  std::string read_by_library(uint64_t begin, uint64_t count, void* out) const;
  std::string read_directly(uint64_t address, uint64_t count, void* out) const;
  void learn_address(uint64_t chunk);

  Hdf5Handle dataset_;
  hid_t type_ = H5I_INVALID_HID;
  uint64_t width_ = 0;  // bytes of a number
  int descriptor_ = -1;
  uint64_t chunk_elements_ = 0;
  std::vector<uint64_t>
      addresses_;  // of each verified chunk in the file, else 0; empty: always by the library
};

}  // namespace graft::data
