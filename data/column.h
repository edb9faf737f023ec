// A column: a one-dimensional HDF5 dataset of numbers, read at any place and nearly as fast as the
// bare file. Where chunks hold the numbers as they are, libhdf5 only says where each one lies; its
// bytes are taken from the file itself, the first time all of them, to verify checksum and values.
// (Its own way costs a whole chunk for every read, and a checksum at a twentieth of the speed.) All
// else goes by a DatasetReader, and so does whatever is wrong: it has the last word and the
// message.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "data/dataset_reader.h"
#include "data/hdf5.h"

namespace graft::data {

template <class Number>  // uint32_t or uint8_t
class Column {
 public:
  Column() = default;
  /// @param dataset     of one dimension, with chunks small enough to be held in memory
  /// @param limit       sound values are below it
  /// @param descriptor  the file that holds it, open as long as the dataset is
  Column(Hdf5Handle dataset, int64_t limit, int descriptor);

  /// Reads the numbers from `begin` on, which must be inside. The caller holds an Hdf5Lock.
  /// @param sound  becomes false if the values are still to be checked: not all are of chunks whose
  ///               values were found sound and whose checksum was, and is not that of zeros alone
  /// @return why it failed; empty: it did not
  std::string read(uint64_t begin, std::span<Number> out, bool& sound);

 private:
  /// What was learnt of a chunk when it was read first.
  struct Chunk {
    uint64_t address = 0;  // in the file; 0: nothing
    bool sound = false;
  };

  bool read_new_chunk(Chunk& chunk, uint64_t inside, std::span<Number> out);
  bool read_bytes(uint64_t address, void* out, uint64_t bytes) const;

  Hdf5Handle dataset_;
  DatasetReader reader_;
  int64_t limit_ = 0;
  int descriptor_ = -1;
  uint64_t chunk_elements_ = 0;
  bool has_checksums_ = false;
  std::vector<Chunk> chunks_;  // empty: always by reader_
};

}  // namespace graft::data
