// kernels/device.h: the branch that a tensor's device takes.
#include "kernels/device.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace graft::kernels {
namespace {

TEST(OnDevice, RunsTheCpuFunctionForATensorInHostMemory) {
  int calls = 0;
  on_device(
      at::empty({4}), [&] { ++calls; }, GRAFT_CUDA([](Stream) { FAIL(); }));
  EXPECT_EQ(calls, 1);
}

TEST(OnDevice, RefusesADeviceWithoutAKernelAndNamesIt) {
  try {
    on_device(
        at::empty({4}, at::kMeta), [] { FAIL(); }, GRAFT_CUDA([](Stream) { FAIL(); }));
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    EXPECT_NE(std::string(error.what()).find("meta"), std::string::npos);
  }
}

}  // namespace
}  // namespace graft::kernels
