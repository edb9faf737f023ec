// launcher/plan: the arithmetic of a step, and how many lanes share a gather.
#include <gtest/gtest.h>

#include "dist/comm_factory.h"
#include "launcher/plan/limit.h"
#include "launcher/plan/memory.h"

namespace graft::launcher {
namespace {

using models::Recompute;

/// Llama-3-8B: 32 layers, width 4096, 8 key-value heads of 128, 14336, a vocabulary of 128,256.
models::ModelInfo llama3_8b() {
  models::ModelInfo info;
  info.hidden_size = 4096, info.num_layers = 32;
  info.block_macs = 32 * int64_t{4096} * (2 * 4096 + 2 * 1024 + 3 * 14336);
  info.head_macs = int64_t{4096} * 128'256;
  info.attention_macs = int64_t{32} * 2 * 4096;
  return info;
}

World one_rank() {
  World world;
  world.host = dist::make_single_comm();
  world.topology.local_world = 1;
  return world;
}

TEST(Limit, MatchesThePublishedCountOfLlama3) {
  // N = 7.505e9 elements, P = 41.9e6 (rank 16 on all linears), a = 2 s d L at s = 8192: the bound
  // of 790 TFLOP/s is then 20,910 tokens/s, and 14,660 with recomputation.
  const double plain = flops_per_token(llama3_8b(), 41'943'040, 8192, Recompute::kOff);
  const double again = flops_per_token(llama3_8b(), 41'943'040, 8192, Recompute::kOn);
  EXPECT_NEAR(790e12 / plain, 20'910, 210);
  EXPECT_NEAR(790e12 / again, 14'660, 150);
}

TEST(Limit, MatrixRateIsThatOfAMachine) {
  const double rate = matmul_rate(at::kCPU, at::kFloat);
  EXPECT_GT(rate, 1e8);
  EXPECT_LT(rate, 1e14);
}

TEST(Memory, RecomputationKeepsTheInputsOfTheStages) {
  EXPECT_EQ(lane_bytes(llama3_8b(), 100, Recompute::kOn, at::kBFloat16), 34 * 4096 * 100 * 2);
  EXPECT_GT(lane_bytes(llama3_8b(), 100, Recompute::kOff, at::kBFloat16),
            10 * lane_bytes(llama3_8b(), 100, Recompute::kOn, at::kBFloat16));
}

TEST(Memory, LanesShareAGatherAsFarAsMemoryGoes) {
  const World world = one_rank();
  const int64_t free = free_memory_bytes(world);
  ASSERT_GT(free, 1 << 20);
  EXPECT_EQ(lanes_that_fit(world, 8, 1), 8);
  EXPECT_EQ(lanes_that_fit(world, 8, 100 * free), 1);
  const int64_t some = lanes_that_fit(world, 8, free / 8);
  EXPECT_TRUE(some >= 3 && some <= 5) << some;  // half of what is free, which moves a little
}

}  // namespace
}  // namespace graft::launcher
