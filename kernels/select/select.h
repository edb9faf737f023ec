// Counting one digit of non-negative scores: the step of a radix-select. The bits of a float32 that
// is not negative order as its values do, so three digits of 11, 11 and 10 bits find the exact k-th
// largest of scores that are cut over ranks: each pass adds up one histogram, and no score travels
// (dist/top_k.h). A sort needs all scores in one place.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace graft::kernels {

/// A digit of the 32 bits, the highest first.
struct Digit {
  int shift, bits;
  int64_t num_values() const { return int64_t{1} << bits; }
};
inline constexpr Digit kDigits[] = {{21, 11}, {10, 11}, {0, 10}};

/// How often each value of `digit` occurs among the scores whose bits above it are those of
/// `prefix`.
/// @param scores  [n] float32, contiguous, none negative or NaN; -0 counts as 0
/// @return        [2^bits] int64, on the device of `scores`
/// @throws graft::Error if dtype or layout do not fit; kNumerics for a negative score or a NaN
at::Tensor digit_counts(const at::Tensor& scores, Digit digit, uint32_t prefix);

/// The bits of a score, as digit_counts sees them: [n] int64.
at::Tensor score_bits(const at::Tensor& scores);

}  // namespace graft::kernels
