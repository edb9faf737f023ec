// AdamW over lists of float32 tensors in one sweep, and the two sums over gradients that an
// optimiser step needs. Gain (2-thread CPU, ops_bench): 420 tensors of 11,700 against _fused_adamw_
// 3.1 to 2.0 ms (one parallel region, not 420), none on one flat tensor; LibTorch's bits change
// with how parameters are grouped, these do not. sum_of_squares of 4.9 million against
// linalg_vector_norm: 0.39 to 0.22 ms, in float64.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace graft::kernels {

struct AdamWConfig {
  double learning_rate = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;  ///< added to sqrt(v_hat)
  double weight_decay = 0.01;
};

/// One step of AdamW in place, as torch.optim.AdamW: p *= 1 - lr wd; m, v averaged; p -= lr m_hat /
/// (sqrt(v_hat) + eps). Elementwise, so the bits depend neither on the thread count nor on how
/// parameters are grouped.
/// All four lists have the same length and, entry by entry, the same shape; float32, contiguous, on
/// one device.
/// @param step  number of this step, from 1
/// @throws graft::Error if lists, shapes, dtypes or the step do not fit
/// Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
void adamw(at::TensorList parameters, at::TensorList gradients, at::TensorList first_moments,
           at::TensorList second_moments, int64_t step, const AdamWConfig& config);

/// Sum of squares in float64 over fixed pieces of 8192 elements, added in order: the same bits for
/// any thread count. It cannot overflow, so it is finite exactly if all elements are.
/// @param values  [...] float32, contiguous
double sum_of_squares(const at::Tensor& values);

/// Index into the flattened tensor of its first NaN or infinity; -1 if there is none.
int64_t first_non_finite(const at::Tensor& values);

}  // namespace graft::kernels
