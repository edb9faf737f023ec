// Sixteen float32 lanes by the compiler's vector extension: what the CPU loops (x_cpu.cpp) are
// written in. Every operation is IEEE and the order of a sum is spelt out, so the bits depend
// neither on the instruction set nor on the thread count. Include it in x_cpu.cpp files only: they
// alone are compiled for GRAFT_MARCH.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/bfloat16.h"

namespace graft::kernels::cpu {

constexpr int kLanes = 16;
using Lanes = float __attribute__((vector_size(64)));
using IntLanes = std::int32_t __attribute__((vector_size(64)));
using UintLanes = std::uint32_t __attribute__((vector_size(64)));
using ShortLanes = std::uint16_t __attribute__((vector_size(32)));

[[gnu::always_inline]] inline Lanes splat(float value) { return Lanes{} + value; }

[[gnu::always_inline]] inline Lanes widen(ShortLanes bits) {
  return (Lanes)(__builtin_convertvector(bits, UintLanes) << 16);
}

/// To bfloat16, nearest even; a NaN stays one (the rule of at::BFloat16).
[[gnu::always_inline]] inline ShortLanes narrow(Lanes value) {
  const UintLanes bits = (UintLanes)value;
  const UintLanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector((value == value) ? rounded : UintLanes{} + 0x7fc0u, ShortLanes);
}

/// The first `count` elements at `from`; the lanes behind them hold `fill`.
[[gnu::always_inline]] inline Lanes load(const float* from, int count = kLanes, float fill = 0) {
  Lanes lanes = splat(fill);
  std::memcpy(&lanes, from, count * sizeof(float));
  return lanes;
}

[[gnu::always_inline]] inline Lanes load(const Bfloat16* from, int count = kLanes, float fill = 0) {
  ShortLanes bits = narrow(splat(fill));
  std::memcpy(&bits, from, count * sizeof(Bfloat16));
  return widen(bits);
}

[[gnu::always_inline]] inline void store(float* to, Lanes value, int count = kLanes) {
  std::memcpy(to, &value, count * sizeof(float));
}

[[gnu::always_inline]] inline void store(Bfloat16* to, Lanes value, int count = kLanes) {
  const ShortLanes bits = narrow(value);
  std::memcpy(to, &bits, count * sizeof(Bfloat16));
}

/// The value after a round trip through T: where LibTorch would cast an intermediate result.
template <class T>
[[gnu::always_inline]] inline Lanes round_to(Lanes value) {
  if constexpr (sizeof(T) == 2) {
    return widen(narrow(value));
  } else {
    return value;
  }
}

/// Calls f(first, count) for consecutive pieces of [0, size) of kLanes, the last one shorter. f is
/// a generic lambda: count is a compile-time constant for the full pieces, so that a load is one
/// instruction.
template <class F>
[[gnu::always_inline]] inline void for_lanes(std::int64_t size, F f) {
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) f(i, std::integral_constant<int, kLanes>{});
  if (i < size) f(i, static_cast<int>(size - i));
}

/// Sum of the lanes as a balanced tree.
[[gnu::always_inline]] inline float sum(Lanes value) {
  float lanes[kLanes];
  std::memcpy(lanes, &value, sizeof(lanes));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

/// The largest lane; NaN lanes are passed over.
[[gnu::always_inline]] inline float largest(Lanes value) {
  float lanes[kLanes];
  std::memcpy(lanes, &value, sizeof(lanes));
  float result = lanes[0];
  for (float lane : lanes) result = lane > result ? lane : result;
  return result;
}

/// Square root of each lane (vectorised because the kernels are compiled without errno).
[[gnu::always_inline]] inline Lanes sqrt(Lanes value) {
  Lanes result;
  for (int i = 0; i < kLanes; ++i) result[i] = __builtin_sqrtf(value[i]);
  return result;
}

/// e^x with a relative error below 2e-7; 0 below -87.3, infinity above 88.37, NaN stays.
/// Source: Cephes expf (Moshier), x = n ln 2 + r, |r| <= ln(2)/2, a degree-5 polynomial in r.
[[gnu::always_inline]] inline Lanes exp(Lanes x) {
  constexpr float kLowest = -87.33654F, kHighest = 88.37626F, kRound = 12582912.0F;  // 1.5 * 2^23
  const Lanes clamped = x < kLowest ? splat(kLowest) : x;
  const Lanes shifted =
      clamped * 1.44269504F + kRound;  // the integer n sits in the low mantissa bits
  const Lanes n = shifted - kRound;
  const Lanes r = (clamped - n * 0.693359375F) + n * 2.12194440e-4F;
  Lanes p = splat(1.9875691500e-4F);
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  const Lanes power = (Lanes)(((UintLanes)shifted << 23) + 0x3f800000u);  // 2^n
  Lanes result = (p * (r * r) + r + 1.0F) * power;
  result = x < kLowest ? Lanes{} : result;
  return x > kHighest ? splat(__builtin_inff()) : result;
}

}  // namespace graft::kernels::cpu
