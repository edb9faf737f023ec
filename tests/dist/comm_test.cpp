// Comm without a launcher: a world of one and virtual ranks.
#include "dist/comm.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "dist/comm_factory.h"
#include "tests/dist/comm_contract.h"

namespace graft::dist {
namespace {

ExitCode code_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.code();
  }
  return ExitCode::kDone;
}

TEST(SingleComm, KeepsTheContract) { testing::expect_contract(*make_single_comm(), at::kCPU); }

TEST(VirtualComm, KeepsTheContractForOneToFiveRanks) {
  for (int world = 1; world <= 5; ++world) {
    run_virtual_ranks(world, [](Comm& comm) { testing::expect_contract(comm, at::kCPU); });
  }
}

TEST(VirtualComm, ShowsGatheredBytesOnlyAfterWaiting) {
  run_virtual_ranks(2, [](Comm& comm) {
    at::Tensor out = at::zeros({2});
    const auto work = comm.all_gather(at::ones({1}), out, Traffic::kGathered, 0);
    EXPECT_EQ(out.sum().item<float>(), 0);
    work->wait();
    EXPECT_EQ(out.sum().item<float>(), 2);
  });
}

TEST(VirtualComm, ARankThatDoesNotComeIsAnErrorWithinTheDeadline) {
  const auto body = [](Comm& comm) {
    if (comm.rank() == 0) comm.barrier();
  };
  EXPECT_EQ(code_of([&] { run_virtual_ranks(2, body, std::chrono::milliseconds(50)); }),
            ExitCode::kCommunication);
}

TEST(VirtualComm, ThrowsTheFirstFailureAndEndsTheOtherRanks) {
  const auto body = [](Comm& comm) {
    GRAFT_CHECK(comm.rank() != 1, ExitCode::kData, "rank 1 fails");
    comm.barrier();
  };
  EXPECT_EQ(code_of([&] { run_virtual_ranks(3, body); }), ExitCode::kData);
}

TEST(VirtualComm, DifferentCollectivesThatMeetAreABug) {
  const auto body = [](Comm& comm) {
    at::Tensor t = at::zeros({2});
    if (comm.rank() == 0) comm.barrier();
    if (comm.rank() == 1) comm.all_reduce(t, Traffic::kControl);
  };
  EXPECT_EQ(code_of([&] { run_virtual_ranks(2, body); }), ExitCode::kBug);
}

}  // namespace
}  // namespace graft::dist
