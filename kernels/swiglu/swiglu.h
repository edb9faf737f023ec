// The gate of a Llama MLP: silu(gate) * up, forward and backward each in one pass.
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
