// The passes over every byte of a shard that tell whether it can be trusted: compiled for the
// machine's widest registers, for they are what reading costs beyond the bare file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace graft::data {

/// The checksum that HDF5's fletcher32 filter stores, little-endian, after the bytes of a chunk. It
/// is 0 for zeros alone.
/// Source: H5_checksum_fletcher32() of libhdf5 (H5checksum.c).
uint32_t fletcher32(std::span<const std::byte> bytes);

/// Are all values below `limit`?
bool all_below(std::span<const uint32_t> values, int64_t limit);
bool all_below(std::span<const uint8_t> values, int64_t limit);

}  // namespace graft::data
