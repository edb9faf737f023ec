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

at::Tensor tree_reduce_scatter(Comm& comm, std::span<const at::Tensor> nodes, int64_t num_lanes,
                               const std::vector<std::vector<Slice>>& slices) {
  const int64_t world = comm.size();
  GRAFT_CHECK(num_lanes > 0 && num_lanes % world == 0, num_lanes, " lanes cannot be shared by ",
              world, " ranks: the lanes of a step must be a multiple of the ranks");
  const int64_t lanes = num_lanes / world;
  std::vector<std::vector<TreeNode>> owned;
  int64_t most_nodes = 0, most_elements = 0;
  std::vector<int64_t> sizes;
  for (int64_t r = 0; r < world; ++r) {
    owned.push_back(maximal_nodes(r * lanes, (r + 1) * lanes, num_lanes));
    most_nodes = std::max(most_nodes, static_cast<int64_t>(owned.back().size()));
    sizes.push_back(0);
    for (const Slice& slice : slices[r]) sizes.back() += slice.size();
    most_elements = std::max(most_elements, sizes.back());
  }
  GRAFT_ASSERT(nodes.size() == owned[comm.rank()].size(), nodes.size(), " values for ",
               owned[comm.rank()].size(), " nodes");

  // Padding: every rank sends and gets `most_elements` of `most_nodes` nodes, zeros where it has
  // less.
  at::Tensor sent = at::zeros({world, most_nodes, most_elements}, nodes[0].options());
  for (int64_t r = 0; r < world; ++r) {
    for (size_t k = 0; k < nodes.size(); ++k) {
      int64_t at = 0;
      for (const Slice& slice : slices[r]) {
        sent[r][static_cast<int64_t>(k)]
            .narrow(0, at, slice.size())
            .copy_(nodes[k].narrow(0, slice.begin, slice.size()));
        at += slice.size();
      }
    }
  }
  at::Tensor received = sent;
  if (world > 1) {
    received = at::empty_like(sent);
    comm.all_to_all(sent, received, Traffic::kReduced);
  }
  Values values;
  for (int64_t r = 0; r < world; ++r) {
    for (size_t k = 0; k < owned[r].size(); ++k) {
      values[{owned[r][k].level, owned[r][k].index}] = received[r][static_cast<int64_t>(k)];
    }
  }
  return add_up({root_level(num_lanes), 0}, num_lanes, values).narrow(0, 0, sizes[comm.rank()]);
}

void tree_all_reduce(Comm& comm, std::span<const at::Tensor> nodes, int64_t num_lanes,
                     at::Tensor& out) {
  for (const at::Tensor& node : nodes) {
    GRAFT_ASSERT(
        node.dim() == 1 && node.sizes() == out.sizes() && node.scalar_type() == out.scalar_type(),
        "node of shape ", node.sizes(), ", sum of shape ", out.sizes());
  }
  // Each rank adds up one chunk of ceil(n/W) elements.
  const int64_t world = comm.size(), size = out.numel(), chunk = (size + world - 1) / world;
  if (world == 1 && nodes.size() == 1) {  // the root
    out.copy_(nodes[0]);
    return;
  }
  std::vector<std::vector<Slice>> chunks;
  for (int64_t r = 0; r < world; ++r)
    chunks.push_back({{std::min(size, r * chunk), std::min(size, (r + 1) * chunk)}});
  const at::Tensor sum = tree_reduce_scatter(comm, nodes, num_lanes, chunks);
  at::Tensor whole = at::empty({world * chunk}, out.options());
  comm.all_gather(at::constant_pad_nd(sum, {0, chunk - sum.numel()}).contiguous(), whole,
                  Traffic::kReduced, kChunkTag)
      ->wait();
  out.copy_(whole.narrow(0, 0, size));
}

namespace {

constexpr int kSquaresLevel = 18;  // of the nodes that are squared in one piece: 2 MiB of float64

/// A node's value, from the elements [begin, ...) of its vector.
double squares(const at::Tensor& elements, int64_t begin, TreeNode node) {
  const int64_t first = (node.index << node.level) - begin, width = int64_t{1} << node.level;
  if (first >= elements.numel()) return 0;
  if (node.level > kSquaresLevel) {
    return squares(elements, begin, {node.level - 1, 2 * node.index}) +
           squares(elements, begin, {node.level - 1, 2 * node.index + 1});
  }
  const int64_t size = std::min(width, elements.numel() - first);
  at::Tensor sum = at::constant_pad_nd(elements.narrow(0, first, size).to(at::kDouble).square(),
                                       {0, width - size});
  for (int level = node.level; level > 0; --level)
    sum = sum.slice(0, 0, sum.numel(), 2) + sum.slice(0, 1, sum.numel(), 2);
  return sum.item<double>();
}

}  // namespace

double tree_sum_of_squares(Comm& comm, std::span<const CutVector> vectors) {
  std::vector<double> values;  // of the maximal nodes of every slice, those of other ranks zero
  bool cut = false;
  for (const CutVector& v : vectors) {
    cut = cut || v.slices.size() > 1;
    for (size_t r = 0; r < v.slices.size(); ++r) {
      const bool mine = v.slices.size() == 1 || static_cast<int>(r) == comm.rank();
      for (const TreeNode node : maximal_nodes(v.slices[r].begin, v.slices[r].end, v.numel))
        values.push_back(mine ? squares(v.mine, v.slices[r].begin, node) : 0);
    }
  }
  at::Tensor all = at::tensor(values, at::kDouble);
  if (cut) {
    all = all.to(vectors.front().mine.device());
    comm.all_reduce(all, Traffic::kControl);  // of one number and zeros: exact in any order
    all = all.cpu();
  }
  double total = 0;
  int64_t at = 0;
  for (const CutVector& v : vectors) {
    Values of_nodes;
    for (const Slice& slice : v.slices) {
      for (const TreeNode node : maximal_nodes(slice.begin, slice.end, v.numel))
        of_nodes[{node.level, node.index}] = all[at++];
    }
    total += add_up({root_level(v.numel), 0}, v.numel, of_nodes).item<double>();
  }
  return total;
}

}  // namespace graft::dist
