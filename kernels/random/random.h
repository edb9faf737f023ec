// Counter-based random numbers (Philox 4x32-10): element i of a tensor is a pure function of (key,
// offset + i), so the bits do not depend on chunks, threads, ranks or history. uniform and
// dropout_mask give the same bits on CPU and CUDA; normal goes through log, cos and sin, so it is
// bit-equal on one machine and equal to 1e-6 across devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "kernels/random/key.h"

namespace graft::kernels {

/// Fills `out` (float32, contiguous, any shape) with multiples of 2^-24 in [0, 1).
/// @param offset  number of the first element in the key's sequence
/// @throws graft::Error if `out` is not contiguous float32
void uniform(const at::Tensor& out, Key key, uint64_t offset = 0);

/// Fills `out` (float32, contiguous) with draws of N(0, 1), by Box and Muller; |x| < 5.8.
void normal(const at::Tensor& out, Key key, uint64_t offset = 0);

/// Fills `out` (float32, contiguous) with 0, with the given probability, else 1 / (1 -
/// probability).
/// @throws graft::Error if probability is not in [0, 1)
void dropout_mask(const at::Tensor& out, Key key, double probability, uint64_t offset = 0);

}  // namespace graft::kernels
