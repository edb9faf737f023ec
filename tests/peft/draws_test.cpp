// What methods that save a seed draw from it.
#include "peft/draws.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>

namespace graft::peft {
namespace {

TEST(FirstOfRandperm, IsTheBeginningOfPyTorchsPermutation) {
  for (const int64_t n : {1, 2, 7, 1000, 4608}) {
    for (const uint64_t seed : {0ULL, 777ULL, 1ULL << 40}) {
      const Tensor all = at::randperm(n, at::make_generator<at::CPUGeneratorImpl>(seed), at::kLong);
      for (const int64_t count : {int64_t{1}, n / 3, n}) {
        EXPECT_TRUE(at::equal(first_of_randperm(n, count, seed), all.slice(0, 0, count)))
            << n << " " << count << " " << seed;
      }
    }
  }
}

}  // namespace
}  // namespace graft::peft
