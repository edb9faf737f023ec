// What methods that save a seed draw from it.
#include "peft/draws.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>

#include "peft/numpy_random.h"

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

// Printed by NumPy 2.4.6.
TEST(NumpyGenerator, ChoosesAndShufflesAsNumpyDoes) {
  struct Drawn {
    uint32_t seed;
    int64_t n, count;
    std::vector<int64_t> first;     ///< of default_rng(seed).choice(n, count, replace=False)
    int64_t last, sum;              ///< and of number * value
    std::vector<int64_t> shuffled;  ///< then shuffle(arange(7))
  };
  const std::vector<Drawn> all = {
      {42, 10, 3, {9, 0, 6}, 6, 12, {6, 4, 0, 1, 3, 5, 2}},
      {0, 12, 12, {9, 1, 0, 7}, 10, 424, {4, 2, 1, 3, 5, 6, 0}},
      {4000000000, 20000, 400, {12476, 7025, 18287}, 10014, 786979314, {5, 0, 3, 2, 6, 1, 4}},
      {7, 20000, 401, {12600, 10553, 16809, 18394}, 18898, 841446235, {6, 5, 2, 1, 4, 3, 0}}};
  for (const Drawn& expected : all) {
    NumpyGenerator generator(expected.seed);
    const auto chosen = generator.choice(expected.n, expected.count);
    ASSERT_EQ(std::ssize(chosen), expected.count);
    EXPECT_TRUE(std::equal(expected.first.begin(), expected.first.end(), chosen.begin()));
    EXPECT_EQ(chosen.back(), expected.last);
    int64_t sum = 0;
    for (size_t i = 0; i < chosen.size(); ++i) sum += static_cast<int64_t>(i) * chosen[i];
    EXPECT_EQ(sum, expected.sum) << expected.seed;
    std::vector<int64_t> values = {0, 1, 2, 3, 4, 5, 6};
    generator.shuffle(values);
    EXPECT_EQ(values, expected.shuffled) << expected.seed;
  }
}

}  // namespace
}  // namespace graft::peft
