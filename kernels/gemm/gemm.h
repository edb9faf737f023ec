// Matrix products of frozen and adapter matrices. On a CPU float32 goes through LibTorch's oneDNN,
// which uses AVX-512 on every vendor's CPU; LibTorch's own choice is MKL, which falls back to AVX2
// where the CPU is not Intel's (one core of an AMD EPYC with AVX-512, 512 x 1536 x 576: 207 against
// 92 GFLOP/s; tests/bench/ops_bench.cpp). All else is LibTorch's.
#pragma once

#include <ATen/core/Tensor.h>

namespace graft::kernels {

/// a b. Not differentiable: for use inside autograd functions.
/// @param a  [M, K]
/// @param b  [K, N], any strides (w.t() is not copied by us)
/// @return   [M, N] in their common dtype
at::Tensor gemm(const at::Tensor& a, const at::Tensor& b);

/// x w^T.   x [..., in], w [out, in] -> [..., out]. Not differentiable.
at::Tensor gemm_linear(const at::Tensor& x, const at::Tensor& w);

}  // namespace graft::kernels
