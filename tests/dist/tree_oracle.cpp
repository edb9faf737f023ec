#include "tests/dist/tree_oracle.h"

#include <ATen/ATen.h>

#include <cmath>
#include <random>

#include "dist/tree_reduce.h"

namespace graft::dist::testing {

std::vector<at::Tensor> random_lanes(int64_t count, int64_t size, at::ScalarType type) {
  std::mt19937 random(17);
  const auto uniform = [&random] { return random() / 4294967296.0; };  // [0, 1) on any platform
  std::vector<at::Tensor> lanes;
  for (int64_t k = 0; k < count; ++k) {
    at::Tensor lane = at::empty({size}, at::kDouble);
    for (int64_t i = 0; i < size; ++i) {
      const double sign = uniform() < 0.5 ? -1 : 1;
      lane.data_ptr<double>()[i] =
          sign * (1 + uniform()) * std::exp2(std::floor(40 * uniform()) - 20);
    }
    lanes.push_back(lane.to(type));
  }
  return lanes;
}

at::Tensor tree_by_definition(const std::vector<at::Tensor>& lanes, int level, int64_t index) {
  if (level == 0) return lanes[index];
  const at::Tensor left = tree_by_definition(lanes, level - 1, 2 * index);
  const bool has_right = ((2 * index + 1) << (level - 1)) < static_cast<int64_t>(lanes.size());
  return has_right ? left + tree_by_definition(lanes, level - 1, 2 * index + 1) : left;
}

at::Tensor tree_by_definition(const std::vector<at::Tensor>& lanes) {
  int level = 0;
  while ((size_t{1} << level) < lanes.size()) ++level;
  return tree_by_definition(lanes, level, 0);
}

std::vector<at::Tensor> sum_lanes_of_rank(const std::vector<at::Tensor>& lanes, int64_t begin,
                                          int64_t end) {
  TreeSum sum(static_cast<int64_t>(lanes.size()));
  for (int64_t lane = begin; lane < end; ++lane) sum.add(lane, lanes[lane].clone());
  return sum.finish();
}

}  // namespace graft::dist::testing
