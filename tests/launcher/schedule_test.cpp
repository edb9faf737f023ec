// Expected rates: transformers 5.17, get_scheduler and get_wsd_schedule with a peak of 1.
#include "launcher/optim/schedule.h"

#include <gtest/gtest.h>

#include <vector>

namespace graft::launcher {
namespace {

std::vector<double> rates(const std::string& type, int64_t steps) {
  const Schedule schedule{type, 1.0, steps, 3};
  std::vector<double> out;
  for (int64_t step = 0; step < steps; ++step) out.push_back(schedule(step));
  return out;
}

void expect_near(const std::vector<double>& got, const std::vector<double>& expected) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], expected[i], 1e-11) << "step " << i;
}

constexpr double kThird = 0.333333333333333, kTwoThirds = 0.666666666666667;

TEST(Schedule, CosineFallsAsTransformersDoes) {
  expect_near(rates("cosine", 10),
              {0.0, kThird, kTwoThirds, 1.0, 0.950484433951, 0.811744900929, 0.611260466978,
               0.388739533022, 0.188255099071, 0.049515566049});
}

TEST(Schedule, LinearFallsAsTransformersDoes) {
  expect_near(rates("linear", 10),
              {0.0, kThird, kTwoThirds, 1.0, 0.857142857143, 0.714285714286, 0.571428571429,
               0.428571428571, 0.285714285714, 0.142857142857});
}

TEST(Schedule, ConstantStaysAfterTheWarmUp) {
  expect_near(rates("constant", 5), {0.0, kThird, kTwoThirds, 1.0, 1.0});
}

TEST(Schedule, WsdDecaysOverTheLastTenth) {
  std::vector<double> expected(30, 1.0);
  expected[0] = 0.0, expected[1] = kThird, expected[2] = kTwoThirds;
  expected[28] = 0.75, expected[29] = 0.25;
  expect_near(rates("wsd", 30), expected);
}

}  // namespace
}  // namespace graft::launcher
