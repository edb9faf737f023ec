// kernels/select against a sort: the digits found from counts are those of the k-th largest score.
#include "kernels/select/select.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <bit>
#include <limits>

#include "configs/check.h"
#include "kernels/random/random.h"

namespace graft::kernels {
namespace {

/// Scores of every magnitude, with zeros, denormals, infinity and many ties.
at::Tensor scores(int64_t n) {
  at::Tensor s = at::empty({n});
  normal(s, {4, 0});
  s = s.abs().pow(9).mul(1e-20);
  s.slice(0, 0, n / 3).fill_(0.25);
  s.slice(0, n / 3, n / 2).zero_();
  if (n > 3) s[n - 1] = std::numeric_limits<float>::infinity(), s[n - 2] = 1e-44F, s[n - 3] = -0.0F;
  return s;
}

/// The bits of the k-th largest.
uint32_t kth_bits(const at::Tensor& s, int64_t k) {
  uint32_t prefix = 0;
  for (const Digit digit : kDigits) {
    const at::Tensor counts = digit_counts(s, digit, prefix);
    int64_t value = digit.num_values() - 1;
    for (; counts[value].item<int64_t>() < k; --value) k -= counts[value].item<int64_t>();
    prefix |= static_cast<uint32_t>(value) << digit.shift;
  }
  return prefix;
}

TEST(Select, DigitsOfTheCountsAreThoseOfTheKthLargest) {
  for (const int64_t n : {1, 2, 7, 1000, 5000}) {
    const at::Tensor s = scores(n);
    const at::Tensor sorted = std::get<0>(s.sort(0, true)).add(0.0);
    for (int64_t k = 1; k <= n; k += std::max<int64_t>(1, n / 13))
      EXPECT_EQ(kth_bits(s, k), std::bit_cast<uint32_t>(sorted[k - 1].item<float>()))
          << k << " of " << n;
  }
}

TEST(Select, CountsOnlyScoresWithThePrefix) {
  const at::Tensor s = at::tensor({1.0F, 1.5F, 1.5F, 4.0F, 0.0F});
  EXPECT_EQ(digit_counts(s, kDigits[0], 0).sum().item<int64_t>(), 5);
  const auto prefix = std::bit_cast<uint32_t>(1.5F);
  EXPECT_EQ(digit_counts(s, kDigits[2], prefix).sum().item<int64_t>(), 2);
  EXPECT_EQ(digit_counts(at::empty({0}), kDigits[0], 0).sum().item<int64_t>(), 0);
}

TEST(Select, ScoresBelowZeroAndNanAreRefused) {
  for (const float bad : {-1.0F, std::numeric_limits<float>::quiet_NaN()})
    EXPECT_THROW(digit_counts(at::tensor({1.0F, bad}), kDigits[0], 0), Error);
}

}  // namespace
}  // namespace graft::kernels
