// Sums over the lanes (micro-batches) of a step by one fixed binary tree, so the bits of the result
// depend neither on the number of ranks nor on who adds what. Node (level l, index j) covers the
// lanes [j << l, (j+1) << l), cut at the number of lanes N; its value is value(left child) +
// value(right child), or value(left) where the right is empty. The root has level ceil(log2 N).
// Rank r of W owns the N/W lanes from r N/W and adds up the nodes inside its range; the nodes above
// are added in pieces, a piece a rank.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

namespace graft::dist {

class Comm;

struct TreeNode {
  int level;
  int64_t index;
  bool operator==(const TreeNode&) const = default;
};

/// The fewest nodes that exactly cover the lanes [begin, end) of `num_lanes`, in lane order. Of
/// nodes that cover the same lanes, the highest.
std::vector<TreeNode> maximal_nodes(int64_t begin, int64_t end, int64_t num_lanes);

/// Adds up the lanes of one rank as they come, like a binary counter: holds at most log2(lanes) + 1
/// tensors.
class TreeSum {
 public:
  explicit TreeSum(int64_t num_lanes) : num_lanes_(num_lanes) {}

  /// Takes over `value` (it may be written to) as the value of `lane`. Lanes come without gaps, in
  /// increasing order; a lane without tokens brings zeros.
  void add(int64_t lane, at::Tensor value);
  /// The values of the maximal nodes of the lanes that came, in lane order. Leaves the sum empty.
  std::vector<at::Tensor> finish();

 private:
  struct Partial {
    TreeNode node;
    at::Tensor value;
  };
  int64_t num_lanes_;
  int64_t next_lane_ = -1;
  std::vector<Partial> partials_;
};

/// A part of a flat tensor: elements [begin, end).
struct Slice {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

/// Sums over all lanes of all ranks: each rank gets its slices of the sum, one after the other,
/// with the bits of the one-rank tree. Collective.
/// @param nodes   flat, contiguous float32 or float64, one per maximal node of this rank's lanes
/// @param slices  of each rank
/// Each rank receives (W-1) K m elements (Traffic::kReduced), m the most elements of a rank and K
/// the most nodes.
at::Tensor tree_reduce_scatter(Comm& comm, std::span<const at::Tensor> nodes, int64_t num_lanes,
                               const std::vector<std::vector<Slice>>& slices);

/// Sums over all lanes of all ranks: `out` gets the bits of the one-rank tree on every rank.
/// Collective.
/// @param nodes  flat, contiguous float32 or float64, one per maximal node of this rank's lanes
/// @param out    like one of them
/// Each rank receives (W-1) (K+1) ceil(n/W) elements (Traffic::kReduced), n the elements of a node
/// and K the most nodes that a rank has: 1 when N/W is a power of two, and an all-reduce's ring
/// sends no less.
/// @throws graft::Error if `num_lanes` is not a multiple of the number of ranks
void tree_all_reduce(Comm& comm, std::span<const at::Tensor> nodes, int64_t num_lanes,
                     at::Tensor& out);

/// A vector that is cut over the ranks, or that each of them has whole.
struct CutVector {
  int64_t numel;
  std::vector<Slice> slices;  ///< of each rank, in order; one: every rank has it all
  at::Tensor mine;            ///< [size of this rank's slice] float32
};

/// The sum of the squares of all vectors, in float64, each as a tree over its elements: the same
/// bits wherever they are cut. Collective (Traffic::kControl, a few hundred bytes a vector) if one
/// is cut.
double tree_sum_of_squares(Comm& comm, std::span<const CutVector> vectors);

}  // namespace graft::dist
