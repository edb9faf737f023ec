// Float32 seen as bits: what the quantising CPU loops share. Include it in x_cpu.cpp files only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace graft::kernels::cpu {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

/// The largest magnitude; NaN if there is one, because its bits are above those of every number.
inline float largest_magnitude(const float* values, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, bits_of(values[i]) & 0x7fffffffu);
  float magnitude;
  std::memcpy(&magnitude, &largest, sizeof(magnitude));
  return magnitude;
}

}  // namespace graft::kernels::cpu
