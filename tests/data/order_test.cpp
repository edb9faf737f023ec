// Order is a permutation that is computed: bijection, inverse, keys, evenness.
#include "data/order.h"

#include <gtest/gtest.h>

#include <vector>

namespace graft::data {
namespace {

TEST(Order, IsABijectionForEverySizeUpTo1000) {
  for (int64_t size = 1; size <= 1000; ++size) {
    const Order order(7, 3, size);
    std::vector<bool> seen(size, false);
    for (int64_t position = 0; position < size; ++position) {
      const int64_t index = order.index(position);
      ASSERT_TRUE(index >= 0 && index < size && !seen[index]) << size << " " << position;
      seen[index] = true;
    }
  }
}

TEST(Order, IsABijectionForALargeSize) {
  const int64_t size = 3'000'017;
  const Order order(1, 0, size);
  std::vector<bool> seen(size, false);
  for (int64_t position = 0; position < size; ++position) {
    const int64_t index = order.index(position);
    ASSERT_FALSE(seen.at(index));
    seen[index] = true;
  }
}

TEST(Order, PositionInvertsIndexAtAnySize) {
  for (const int64_t size :
       {int64_t{1}, int64_t{2}, int64_t{97}, int64_t{1} << 40, (int64_t{1} << 62) + 5}) {
    const Order order(9, 2, size);
    for (int64_t i = 0; i < 1000; ++i) {
      const int64_t position = size / 1000 * i + i % size;
      if (position >= size) continue;
      const int64_t index = order.index(position);
      ASSERT_TRUE(index >= 0 && index < size);
      ASSERT_EQ(order.position(index), position) << size;
    }
  }
}

TEST(Order, DiffersBySeedAndByEpoch) {
  const int64_t size = 10'000;
  const Order order(5, 0, size), other_seed(6, 0, size), other_epoch(5, 1, size);
  int64_t same_seed = 0, same_epoch = 0;
  for (int64_t p = 0; p < size; ++p) {
    same_seed += order.index(p) == other_seed.index(p);
    same_epoch += order.index(p) == other_epoch.index(p);
  }
  // Two random permutations agree in Poisson(1) places: more than 12 has probability 6e-11.
  EXPECT_LE(same_seed, 12);
  EXPECT_LE(same_epoch, 12);
}

TEST(Order, SpreadsEachPositionEvenlyOverTheIndexes) {
  // Where 4 fixed positions of 16 go, over 4000 epochs: chi-squared, 15 degrees of freedom, p =
  // 1e-5 at 49.
  const int64_t size = 16, epochs = 4000;
  for (const int64_t position : {0, 1, 7, 15}) {
    std::vector<double> count(size, 0);
    for (int64_t epoch = 0; epoch < epochs; ++epoch)
      ++count[Order(11, epoch, size).index(position)];
    const double expected = static_cast<double>(epochs) / size;
    double chi_squared = 0;
    for (const double c : count) chi_squared += (c - expected) * (c - expected) / expected;
    EXPECT_LT(chi_squared, 49) << "position " << position;
  }
}

TEST(Order, NeighboursLandApart) {
  // The mean distance of two independent draws is size / 3.
  const int64_t size = 100'000;
  const Order order(3, 0, size);
  double sum = 0;
  for (int64_t p = 0; p + 1 < size; ++p)
    sum += std::abs(static_cast<double>(order.index(p + 1) - order.index(p)));
  EXPECT_NEAR(sum / size / size, 1.0 / 3, 0.01);
}

}  // namespace
}  // namespace graft::data
