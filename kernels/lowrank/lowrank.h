// The product of every low-rank adapter, added to what the frozen layer has already computed.
// Gain over base + s * (x A^T) B^T (forward and backward, 2-thread CPU, ops_bench), r = 16:
//   512 tokens, 576 to 1536     float32 1.4x, bfloat16 1.3x
//   2048 tokens, 4096 to 4096   float32 1.9x, bfloat16 1.25x
#pragma once

#include <ATen/core/Tensor.h>

namespace graft::kernels {

/// base_out += scale * (x A^T) B^T, in place, and returns it: neither the update nor its scaled
/// copy is ever stored. Differentiable in base_out, x, a and b; saves x A^T, and x if A is
/// trained. The products run in the dtype of x (A and B are cast once, a fraction of the work); the
/// gradients of A and B are returned in their own dtype, so sums over lanes are float32 sums.
/// @param base_out  [..., out] in the dtype of x, contiguous; no backward may need its old value
/// @param x         [..., in] float32, bfloat16 or float64, same leading sizes
/// @param a         [r, in] any floating dtype
/// @param b         [out, r] likewise
/// @throws graft::Error if a shape or dtype does not fit
/// Source: Hu et al. 2021, arXiv:2106.09685, eq. 3.
at::Tensor lowrank_add(at::Tensor base_out, const at::Tensor& x, const at::Tensor& a,
                       const at::Tensor& b, double scale);

}  // namespace graft::kernels
