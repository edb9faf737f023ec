// Limit: what a step costs by arithmetic and what this machine could do at most, for the metrics
// `mfu` and `limit_fraction`. The formula is the usual count of a step with a frozen base: no
// weight gradient but the adapters'.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "models/model.h"
#include "models/trunk.h"

namespace graft::launcher {

/// Floating-point operations of one token, forward and backward: 4 N + 3.5 a + 6 P, and with
/// recomputation 2 N_b + a more, where N are the frozen matrices' elements (N_b: of the blocks), P
/// the trained parameters, and a = 2 s d L the causal attention over s tokens.
/// @param length  s, tokens of a row: documents packed into it are counted as one, so the figure is
///                an upper bound
double flops_per_token(const models::ModelInfo& info, int64_t trained, int64_t length,
                       models::Recompute recompute);

/// Operations a second of a large matrix product on this device with this process's threads: the
/// best of a few, some 0.2 s. Ranks that share cores must measure together.
double matmul_rate(at::Device device, at::ScalarType dtype);

}  // namespace graft::launcher
