// Names of random sequences: what is drawn depends on a key and an element's number, never on what
// was drawn before, on the rank or on the number of threads.
#pragma once

#include <cstdint>

namespace graft::kernels {

/// A sequence of 2^66 elements: the run's seed, and which of its sequences.
struct Key {
  uint64_t seed;
  uint64_t stream;
};

/// One output of SplitMix64 from state x (Steele, Lea and Flood 2014): a bijection that spreads
/// small numbers.
constexpr uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

/// The key of a sub-sequence: derive(key, step, lane, slot). The order of the numbers matters.
template <class... Numbers>
constexpr Key derive(Key key, Numbers... numbers) {
  ((key.stream = splitmix64(key.stream ^ splitmix64(static_cast<uint64_t>(numbers)))), ...);
  return key;
}

}  // namespace graft::kernels
