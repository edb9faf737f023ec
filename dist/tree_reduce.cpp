#include "dist/tree_reduce.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <map>
#include <utility>

#include "configs/check.h"
#include "dist/comm.h"

namespace graft::dist {
namespace {

constexpr int64_t kChunkTag =
    -2;  // tells this all_gather from those of blocks (0 and up) and texts (-1)

int root_level(int64_t num_lanes) { return std::bit_width(static_cast<uint64_t>(num_lanes - 1)); }

/// True if `node` has no lanes because it starts behind the last.
bool is_empty(TreeNode node, int64_t num_lanes) { return node.index << node.level >= num_lanes; }

using Values = std::map<std::pair<int, int64_t>, at::Tensor>;  // by level and index

/// The canonical sum at `node` from the given nodes below it, which are written to.
at::Tensor add_up(TreeNode node, int64_t num_lanes, Values& values) {
  if (const auto found = values.find({node.level, node.index}); found != values.end()) {
    return found->second;
  }
  GRAFT_ASSERT(node.level > 0, "no rank owns lane ", node.index, " of ", num_lanes);
  const TreeNode left = {node.level - 1, 2 * node.index};
  const TreeNode right = {node.level - 1, 2 * node.index + 1};
  at::Tensor sum = add_up(left, num_lanes, values);
  if (!is_empty(right, num_lanes)) sum.add_(add_up(right, num_lanes, values));
  return sum;
}

}  // namespace

std::vector<TreeNode> maximal_nodes(int64_t begin, int64_t end, int64_t num_lanes) {
  GRAFT_ASSERT(0 <= begin && begin <= end && end <= num_lanes, "lanes ", begin, " to ", end, " of ",
               num_lanes);
  std::vector<TreeNode> nodes;
  while (begin < end) {
    int level = root_level(num_lanes);
    const auto fits = [&] {
      const int64_t width = int64_t{1} << level;
      return begin % width == 0 && std::min(begin + width, num_lanes) <= end;
    };
    while (!fits()) --level;
    nodes.push_back({level, begin >> level});
    begin += int64_t{1} << level;
  }
  return nodes;
}

void TreeSum::add(int64_t lane, at::Tensor value) {
  GRAFT_ASSERT(lane >= 0 && lane < num_lanes_ && (next_lane_ < 0 || lane == next_lane_), "lane ",
               lane, " of ", num_lanes_, " came when ", next_lane_, " was due");
  next_lane_ = lane + 1;
  TreeNode node = {0, lane};
  while (node.level < root_level(num_lanes_)) {
    if (node.index % 2 == 0) {  // complete as it is if nothing is to its right, else wait for that
      if (!is_empty({node.level, node.index + 1}, num_lanes_)) break;
    } else {
      const TreeNode left = {node.level, node.index - 1};
      if (partials_.empty() || partials_.back().node != left) break;  // another rank's
      value = partials_.back().value.add_(value);
      partials_.pop_back();
    }
    node = {node.level + 1, node.index / 2};
  }
  partials_.push_back({node, std::move(value)});
}

std::vector<at::Tensor> TreeSum::finish() {
  std::vector<at::Tensor> values;
  for (Partial& partial : partials_) values.push_back(std::move(partial.value));
  partials_.clear();
  next_lane_ = -1;
  return values;
}

void tree_all_reduce(Comm& comm, std::span<const at::Tensor> nodes, int64_t num_lanes,
                     at::Tensor& out) {
  const int64_t world = comm.size();
  GRAFT_CHECK(num_lanes > 0 && num_lanes % world == 0, num_lanes, " lanes cannot be shared by ",
              world, " ranks: the lanes of a step must be a multiple of the ranks");
  const int64_t lanes = num_lanes / world;
  std::vector<std::vector<TreeNode>> owned;
  int64_t most_nodes = 0;
  for (int64_t r = 0; r < world; ++r) {
    owned.push_back(maximal_nodes(r * lanes, (r + 1) * lanes, num_lanes));
    most_nodes = std::max(most_nodes, static_cast<int64_t>(owned.back().size()));
  }
  GRAFT_ASSERT(nodes.size() == owned[comm.rank()].size(), nodes.size(), " values for ",
               owned[comm.rank()].size(), " nodes");
  if (world == 1) {  // the only node is the root
    out.copy_(nodes[0]);
    return;
  }

  // Padding: a rank's chunk has ceil(n/W) elements and every rank sends `most_nodes` of them, zeros
  // where it has none.
  const int64_t size = out.numel();
  const int64_t chunk = (size + world - 1) / world;
  at::Tensor sent = at::zeros({world, most_nodes, chunk}, out.options());
  for (size_t k = 0; k < nodes.size(); ++k) {
    GRAFT_ASSERT(nodes[k].dim() == 1 && nodes[k].sizes() == out.sizes() &&
                     nodes[k].scalar_type() == out.scalar_type(),
                 "node of shape ", nodes[k].sizes(), ", sum of shape ", out.sizes());
    sent.select(1, k).copy_(
        at::constant_pad_nd(nodes[k], {0, world * chunk - size}).view({world, chunk}));
  }
  at::Tensor received = at::empty_like(sent);
  comm.all_to_all(sent, received, Traffic::kReduced);

  Values values;
  for (int64_t r = 0; r < world; ++r) {
    for (size_t k = 0; k < owned[r].size(); ++k) {
      values[{owned[r][k].level, owned[r][k].index}] = received[r][static_cast<int64_t>(k)];
    }
  }
  const at::Tensor sum = add_up({root_level(num_lanes), 0}, num_lanes, values);
  at::Tensor whole = at::empty({world * chunk}, out.options());
  comm.all_gather(sum, whole, Traffic::kReduced, kChunkTag)->wait();
  out.copy_(whole.narrow(0, 0, size));
}

}  // namespace graft::dist
