#include "data/order.h"

#include <algorithm>
#include <bit>

#include "configs/check.h"

namespace graft::data {
namespace {

constexpr uint64_t kPurpose =
    0x6f72646572ULL;  // "order": other uses of the seed draw other numbers

/// The finaliser of SplitMix64: a bijection of 64 bits in which every input bit reaches every
/// output bit. Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
/// generators".
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

}  // namespace

Order::Order(uint64_t seed, int64_t epoch, int64_t size) : size_(size) {
  GRAFT_ASSERT(size > 0, "order of ", size, " elements");
  const int bits = std::bit_width(static_cast<uint64_t>(size - 1));
  half_bits_ = std::max(1, (bits + 1) / 2);
  half_mask_ = (uint64_t{1} << half_bits_) - 1;
  uint64_t key = mix(mix(mix(kPurpose) ^ seed) ^ static_cast<uint64_t>(epoch));
  for (uint64_t& round_key : keys_) round_key = key = mix(key);
}

uint64_t Order::round(int number, uint64_t half) const {
  return mix(keys_[number] ^ half) & half_mask_;
}

int64_t Order::index(int64_t position) const {
  GRAFT_ASSERT(position >= 0 && position < size_, "position ", position, " of ", size_);
  uint64_t left = static_cast<uint64_t>(position) >> half_bits_;
  uint64_t right = static_cast<uint64_t>(position) & half_mask_;
  uint64_t result;
  do {
    for (int i = 0; i < kRounds; ++i) {
      left ^= round(i, right);
      std::swap(left, right);
    }
    result = left << half_bits_ | right;
  } while (result >= static_cast<uint64_t>(size_));
  return static_cast<int64_t>(result);
}

int64_t Order::position(int64_t index) const {
  GRAFT_ASSERT(index >= 0 && index < size_, "index ", index, " of ", size_);
  uint64_t left = static_cast<uint64_t>(index) >> half_bits_;
  uint64_t right = static_cast<uint64_t>(index) & half_mask_;
  uint64_t result;
  do {
    for (int i = kRounds - 1; i >= 0; --i) {
      std::swap(left, right);
      left ^= round(i, right);
    }
    result = left << half_bits_ | right;
  } while (result >= static_cast<uint64_t>(size_));
  return static_cast<int64_t>(result);
}

}  // namespace graft::data
