// The oracle is the definition, written as the recursion it is: no nodes, no ranks, no chunks.
#include "dist/tree_reduce.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "configs/check.h"
#include "dist/comm_factory.h"
#include "tests/dist/comm_contract.h"
#include "tests/dist/tree_oracle.h"

namespace graft::dist {
namespace {

using testing::random_lanes;
using testing::same_bits;
using testing::sum_lanes_of_rank;
using testing::tree_by_definition;

TEST(MaximalNodes, AreFewestHighestAndInLaneOrder) {
  using Nodes = std::vector<TreeNode>;
  EXPECT_EQ(maximal_nodes(0, 1, 1), (Nodes{{0, 0}}));
  EXPECT_EQ(maximal_nodes(0, 8, 8), (Nodes{{3, 0}}));
  EXPECT_EQ(maximal_nodes(0, 5, 5), (Nodes{{3, 0}}));  // cut at the last lane
  EXPECT_EQ(maximal_nodes(4, 8, 8), (Nodes{{2, 1}}));
  EXPECT_EQ(maximal_nodes(3, 6, 12), (Nodes{{0, 3}, {1, 2}}));
  EXPECT_EQ(maximal_nodes(1, 7, 8), (Nodes{{0, 1}, {1, 1}, {1, 2}, {0, 6}}));
  EXPECT_EQ(maximal_nodes(4, 6, 6), (Nodes{{2, 1}}));  // lanes 6 and 7 do not exist
  EXPECT_TRUE(maximal_nodes(2, 2, 4).empty());
}

TEST(TreeSum, GivesTheMaximalNodesOfEveryRange) {
  for (int64_t n = 1; n <= 12; ++n) {
    const std::vector<at::Tensor> lanes = random_lanes(n, 5, at::kFloat);
    for (int64_t begin = 0; begin < n; ++begin) {
      for (int64_t end = begin + 1; end <= n; ++end) {
        const std::vector<TreeNode> nodes = maximal_nodes(begin, end, n);
        const std::vector<at::Tensor> values = sum_lanes_of_rank(lanes, begin, end);
        ASSERT_EQ(values.size(), nodes.size()) << begin << " to " << end << " of " << n;
        for (size_t k = 0; k < nodes.size(); ++k) {
          EXPECT_TRUE(
              same_bits(values[k], tree_by_definition(lanes, nodes[k].level, nodes[k].index)));
        }
      }
    }
  }
}

TEST(TreeSum, RefusesALaneOutOfOrder) {
  TreeSum sum(4);
  sum.add(0, at::zeros({1}));
  EXPECT_THROW(sum.add(2, at::zeros({1})), Error);
  EXPECT_THROW(sum.add(0, at::zeros({1})), Error);
}

TEST(TreeAllReduce, GivesTheSameBitsAtAnyWorldSize) {
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    for (const int64_t n : {1, 2, 3, 4, 5, 6, 7, 8, 12, 16}) {
      const std::vector<at::Tensor> lanes = random_lanes(n, 1003, type);
      const at::Tensor expected = tree_by_definition(lanes);
      for (const int world : {1, 2, 3, 4, 5, 6, 7}) {
        if (n % world != 0) continue;
        run_virtual_ranks(world, [&](Comm& comm) {
          const int64_t mine = n / world;
          const auto nodes = sum_lanes_of_rank(lanes, comm.rank() * mine, (comm.rank() + 1) * mine);
          at::Tensor out = at::zeros_like(lanes[0]);
          tree_all_reduce(comm, nodes, n, out);
          EXPECT_TRUE(same_bits(out, expected)) << n << " lanes on " << world << " ranks";
        });
      }
    }
  }
}

TEST(TreeAllReduce, ItsOracleTellsOrdersApart) {
  const std::vector<at::Tensor> lanes = random_lanes(8, 1003, at::kFloat);
  at::Tensor running = lanes[0].clone();
  for (size_t k = 1; k < lanes.size(); ++k) running.add_(lanes[k]);
  EXPECT_FALSE(same_bits(running, tree_by_definition(lanes)));
}

TEST(TreeAllReduce, ReceivesTheDocumentedBytes) {
  struct Case {
    int world;
    int64_t lanes, most_nodes;
  };
  for (const Case c :
       {Case{2, 8, 1}, Case{4, 4, 1}, Case{3, 12, 1}, Case{2, 6, 2}, Case{4, 12, 2}}) {
    run_virtual_ranks(c.world, [&](Comm& comm) {
      const auto lanes = random_lanes(c.lanes, 1000, at::kFloat);
      const int64_t mine = c.lanes / c.world;
      at::Tensor out = at::zeros({1000});
      tree_all_reduce(comm, sum_lanes_of_rank(lanes, comm.rank() * mine, (comm.rank() + 1) * mine),
                      c.lanes, out);
      const int64_t chunk = (1000 + c.world - 1) / c.world;
      EXPECT_EQ(comm.bytes(Traffic::kReduced), (c.world - 1) * (c.most_nodes + 1) * chunk * 4);
    });
  }
}

TEST(TreeAllReduce, RefusesLanesThatTheRanksCannotShare) {
  const auto body = [](Comm& comm) {
    at::Tensor out = at::zeros({4});
    tree_all_reduce(comm, {}, 3, out);
  };
  EXPECT_THROW(run_virtual_ranks(2, body), Error);
}

}  // namespace
}  // namespace graft::dist
