// The order of an epoch: a keyed permutation of 0..size-1 that is computed, not stored. Position p
// of epoch e is a pure function of (seed, e, p), so a run resumes anywhere at once and every rank
// sees the same order.
#pragma once

#include <cstdint>

namespace graft::data {

/// A pseudo-random permutation: a Feistel network over the smallest even number of bits that holds
/// `size`, walked along its cycle until it lands below `size` (fewer than four rounds of the
/// network on average). Source: Luby and Rackoff 1988 (the network); Black and Rogaway 2002,
/// "Ciphers with arbitrary finite domains" (cycle walking).
class Order {
 public:
  Order(uint64_t seed, int64_t epoch, int64_t size);

  /// The index at a position; 0 <= position < size.
  int64_t index(int64_t position) const;
  /// The position of an index: the inverse of index().
  int64_t position(int64_t index) const;
  int64_t size() const { return size_; }

 private:
  static constexpr int kRounds = 8;
  uint64_t round(int number, uint64_t half) const;

  int64_t size_;
  int half_bits_;
  uint64_t half_mask_;
  uint64_t keys_[kRounds];
};

}  // namespace graft::data
