#include "data/scan.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace graft::data {
namespace {

static_assert(std::endian::native == std::endian::little);

// Vectors as wide as a register: wider ones would be kept in memory.
constexpr size_t kVectorBytes = __BIGGEST_ALIGNMENT__;
constexpr size_t kLanes = kVectorBytes / sizeof(uint32_t);
using Vector = uint32_t __attribute__((vector_size(kVectorBytes)));

/// How many steps the sums of a lane can run before they would overflow 32 bits.
constexpr size_t kStepsBeforeFold = 256;

template <class Value>
Value load(const std::byte* from) {
  Value value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

Vector fold(const Vector& sums) { return (sums & 0xffff) + (sums >> 16); }  // equal modulo 65535

/// The sum modulo 65535, where 0 stays for all zeros and is 65535 else; and the bytes of its words
/// exchanged: HDF5 sums big-endian words, and 256 (a + 256 b) = 256 a + b modulo 65535.
uint32_t finish(uint64_t sum) {
  const uint64_t word = sum == 0 ? 0 : (sum - 1) % 65535 + 1;
  return static_cast<uint32_t>((word << 8 | word >> 8) & 0xffff);
}

template <class Number>
int64_t largest_of(std::span<const Number> values) {
  Number largest = 0;
#pragma omp simd reduction(max : largest)
  for (size_t i = 0; i < values.size(); ++i)
    largest = values[i] > largest ? values[i] : largest;  // GCC does not vectorise std::max here
  return largest;
}

}  // namespace

// Of n words w[i], the sums of w[i] and of (n - i) w[i]. Each lane sums its own words, even and odd
// ones apart, as the scalar algorithm does; what a word's place in the vector takes off its weight
// is taken off at the end (times -k is times 65535 - k).
uint32_t fletcher32(std::span<const std::byte> bytes) {
  Vector even{}, odd{}, even_weighted{}, odd_weighted{};
  const std::byte* from = bytes.data();
  for (size_t left = bytes.size() / kVectorBytes; left > 0;) {
    const size_t run = std::min(left, kStepsBeforeFold);
    for (size_t i = 0; i < run; ++i, from += kVectorBytes) {
      const Vector words = load<Vector>(from);
      even += words & 0xffff;
      even_weighted += even;
      odd += words >> 16;
      odd_weighted += odd;
    }
    even = fold(even), even_weighted = fold(even_weighted);
    odd = fold(odd), odd_weighted = fold(odd_weighted);
    left -= run;
  }
  uint64_t sum = 0, weighted = 0;
  for (uint64_t lane = 0; lane < kLanes; ++lane) {
    sum += uint64_t{even[lane]} + odd[lane];
    weighted += 2 * kLanes * (uint64_t{even_weighted[lane]} + odd_weighted[lane]) +
                (65535 - 2 * lane) * even[lane] + (65535 - 2 * lane - 1) * odd[lane];
  }
  size_t left = bytes.size() % kVectorBytes;
  for (; left > 1; left -= 2, from += 2) weighted += sum += load<uint16_t>(from);
  if (left == 1) weighted += sum += load<uint8_t>(from);
  return finish(weighted) << 16 | finish(sum);
}

bool all_below(std::span<const uint32_t> values, int64_t limit) {
  return largest_of(values) < limit;
}

bool all_below(std::span<const uint8_t> values, int64_t limit) {
  return largest_of(values) < limit;
}

}  // namespace graft::data
