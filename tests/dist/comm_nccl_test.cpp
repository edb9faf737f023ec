// The same contracts over NCCL, ranks sharing the GPUs there are: correctness and order, not speed.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAFunctions.h>
#include <gtest/gtest.h>

#include "dist/comm_factory.h"
#include "dist/tree_reduce.h"
#include "tests/dist/comm_contract.h"
#include "tests/dist/store_cases.h"
#include "tests/dist/tree_oracle.h"

namespace graft::dist {
namespace {

class NcclComm : public ::testing::Test {
 protected:
  void SetUp() override {
    const int num_gpus = c10::cuda::device_count();
    if (num_gpus == 0) GTEST_SKIP() << "no GPU here";
    device_ = bootstrap_->rank() % num_gpus;
    comm_ = make_nccl_comm(*bootstrap_, device_, std::chrono::seconds(60));
  }

  std::unique_ptr<Comm> bootstrap_ = make_mpi_comm();
  int device_ = 0;
  std::unique_ptr<Comm> comm_;
};

TEST_F(NcclComm, KeepsTheContract) {
  testing::expect_contract(*comm_, at::Device(at::kCUDA, device_));
}

TEST_F(NcclComm, BlockStoreSweepsAreExact) {
  testing::expect_sweeps(*comm_, at::Device(at::kCUDA, device_));
}

TEST_F(NcclComm, TreeAllReduceGivesTheBitsOfOneCpuRank) {
  const int64_t rank = comm_->rank();
  const auto lanes = testing::random_lanes(3 * comm_->size(), 1003, at::kFloat);
  std::vector<at::Tensor> nodes;
  for (const at::Tensor& node : testing::sum_lanes_of_rank(lanes, 3 * rank, 3 * rank + 3)) {
    nodes.push_back(node.to(at::Device(at::kCUDA, device_)));
  }
  at::Tensor out = at::zeros_like(nodes[0]);
  tree_all_reduce(*comm_, nodes, static_cast<int64_t>(lanes.size()), out);
  EXPECT_TRUE(testing::same_bits(out.cpu(), testing::tree_by_definition(lanes)));
}

}  // namespace
}  // namespace graft::dist
