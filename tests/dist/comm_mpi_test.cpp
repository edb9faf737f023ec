// The same contracts between processes: run by mpirun with 2, 3 and 4 ranks.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <climits>

#include "dist/comm_factory.h"
#include "dist/topology.h"
#include "dist/tree_reduce.h"
#include "tests/dist/comm_contract.h"
#include "tests/dist/store_cases.h"
#include "tests/dist/tree_oracle.h"

namespace graft::dist {
namespace {

TEST(MpiComm, KeepsTheContract) { testing::expect_contract(*make_mpi_comm(), at::kCPU); }

TEST(MpiComm, OutOfStepGathersOfDifferentSizesThrow) {
  const auto comm = make_mpi_comm();
  if (comm->size() == 1) GTEST_SKIP() << "one rank is never out of step";
  const int64_t size = comm->rank() == 0 ? 200'000 : 1000;
  at::Tensor out = at::zeros({comm->size(), size});
  EXPECT_THROW(
      comm->all_gather(at::ones({size}), out, Traffic::kGathered, comm->rank() == 0)->wait(),
      Error);
}

TEST(MpiComm, ColorsMakeGroupsInWorldOrder) {
  const auto world = make_mpi_comm();
  const auto group = make_mpi_comm(world->rank() % 2);
  EXPECT_EQ(group->rank(), world->rank() / 2);
  EXPECT_EQ(group->size(), (world->size() + 1 - world->rank() % 2) / 2);
  testing::expect_contract(*group, at::kCPU);
}

TEST(MpiComm, RefusesAGatherThatMpiCannotCount) {
  const auto comm = make_mpi_comm();
  char byte = 0;  // never read: the size alone is refused
  const int64_t size = int64_t{INT_MAX} + 1;
  const at::Tensor shard = at::from_blob(&byte, {size}, at::kByte);
  at::Tensor out = at::from_blob(&byte, {size * comm->size()}, at::kByte);
  EXPECT_THROW(comm->all_gather(shard, out, Traffic::kGathered, 0), Error);
}

TEST(MpiComm, TreeAllReduceGivesTheBitsOfOneRank) {
  const auto comm = make_mpi_comm();
  for (const int64_t per_rank : {1, 2, 3, 4}) {
    const auto lanes = testing::random_lanes(per_rank * comm->size(), 1003, at::kFloat);
    at::Tensor out = at::zeros_like(lanes[0]);
    tree_all_reduce(
        *comm,
        testing::sum_lanes_of_rank(lanes, comm->rank() * per_rank, (comm->rank() + 1) * per_rank),
        static_cast<int64_t>(lanes.size()), out);
    EXPECT_TRUE(testing::same_bits(out, testing::tree_by_definition(lanes)));
  }
}

TEST(MpiComm, BlockStoreSweepsAreExact) { testing::expect_sweeps(*make_mpi_comm(), at::kCPU); }

TEST(MpiComm, AgreesWithTheLaunchersVariables) {
  const auto comm = make_mpi_comm();
  Topology topology = detect_topology(process_environment());
  EXPECT_EQ(topology.rank, comm->rank());
  EXPECT_EQ(topology.world, comm->size());
  place_on_nodes(topology, *comm);
  EXPECT_EQ(topology.local_rank, comm->rank());
  EXPECT_EQ(topology.num_nodes, 1);
}

}  // namespace
}  // namespace graft::dist
