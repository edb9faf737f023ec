// What adapters draw: initial values, dropout, and places in a matrix. All are pure functions of a
// key or seed.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/random/random.h"
#include "models/pass.h"

namespace graft::peft {

using at::Tensor;

/// Uniform in [-bound, bound), float32.
Tensor draw_uniform(at::IntArrayRef shape, double bound, kernels::Key key, at::Device device);

/// PyTorch's kaiming_uniform_(a = sqrt 5): uniform within 1 / sqrt(fan in), float32. The fan in of
/// [d0, d1, d2 ...] is d1 * d2 * ...
Tensor draw_kaiming(at::IntArrayRef shape, kernels::Key key, at::Device device);

/// Normal with this standard deviation, float32.
Tensor draw_normal(at::IntArrayRef shape, double deviation, kernels::Key key, at::Device device);

/// N(0, deviation^2) cut at two deviations, float32: PyTorch's trunc_normal_.
Tensor draw_truncated_normal(at::IntArrayRef shape, double deviation, kernels::Key key,
                             at::Device device);

/// x with elements set to zero and the others scaled up, in training; a slot's mask is a function
/// of the pass and its key.
Tensor dropout(const Tensor& x, double probability, const models::Pass& pass, kernels::Key key);

/// The first `count` elements of torch.randperm(n, generator=torch.Generator().manual_seed(seed)),
/// int64, in the time of `count` draws: the places of methods whose files hold a seed only.
Tensor first_of_randperm(int64_t n, int64_t count, uint64_t seed);

}  // namespace graft::peft
