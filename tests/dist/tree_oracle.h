// The canonical tree by its definition, and lanes whose sum depends on the order.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace graft::dist::testing {

/// `count` tensors of `size` numbers with magnitudes from 1e-6 to 1e6 and both signs; equal in
/// every process.
std::vector<at::Tensor> random_lanes(int64_t count, int64_t size, at::ScalarType type);

/// value(level, index) = value(left) + value(right), or value(left) where the right child has no
/// lanes.
at::Tensor tree_by_definition(const std::vector<at::Tensor>& lanes, int level, int64_t index);
/// The root's.
at::Tensor tree_by_definition(const std::vector<at::Tensor>& lanes);

/// What a rank that owns lanes [begin, end) brings to tree_all_reduce(). Leaves `lanes` alone.
std::vector<at::Tensor> sum_lanes_of_rank(const std::vector<at::Tensor>& lanes, int64_t begin,
                                          int64_t end);

}  // namespace graft::dist::testing
