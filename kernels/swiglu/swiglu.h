// The gate of a Llama MLP: silu(gate) * up, forward and backward each in one pass.
// Gain over composed LibTorch (forward and backward, 2-thread CPU, ops_bench), and one tensor in
// three less kept for backward:
//   512 x 1536     float32 0.69 to 0.35 ms, bfloat16 none
//   2048 x 14336   float32 204 to 132 ms, bfloat16 123 to 79 ms
#pragma once

#include <ATen/core/Tensor.h>

namespace graft::kernels {

/// y = silu(gate) * up, silu(g) = g / (1 + e^-g). Differentiable; saves gate and up, nothing else.
/// Computed in float32 and rounded once (composed LibTorch rounds silu to bfloat16 first).
/// @param gate, up  [...] float32 or bfloat16, same shape and dtype
/// @return          [...] of the same shape and dtype, contiguous
/// @throws graft::Error if shapes or dtypes differ
/// Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

}  // namespace graft::kernels
