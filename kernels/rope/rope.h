// Rotary position embedding, half-split (element i of a head turns with i + K/2), in one pass.
// Gain over composed LibTorch (forward and backward, 2-thread CPU, ops_bench):
//   512 tokens x 9 heads x 64   float32 0.21 to 0.05 ms, bfloat16 0.26 to 0.05 ms
#pragma once

#include <ATen/core/Tensor.h>

namespace graft::kernels {

/// y = x * cos + rotate_half(x) * sin, computed in float32 and rounded once. Differentiable in x;
/// saves the tables only.
/// @param x    [B, L, H, K] float32 or bfloat16, K even and dense, else any strides (a slice of a
///             fused qkv will do)
/// @param cos  [L, K] or [B, L, K] float32, the angles written twice (freqs, freqs) as in Hugging
///             Face's tables: the second half is not read. A factor (yarn) may be multiplied in
/// @param sin  as cos
/// @return     [B, L, H, K] in the dtype of x, contiguous
/// @throws graft::Error if a shape or dtype does not fit
/// Source: Su et al. 2021, arXiv:2104.09864, eq. 34, in the pairing of GPT-NeoX.
at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

}  // namespace graft::kernels
