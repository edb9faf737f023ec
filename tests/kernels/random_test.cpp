// kernels/random against the published vectors of Philox and SplitMix64 and against the moments of
// its distributions.
#include "kernels/random/random.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "configs/check.h"
#include "kernels/random/philox.h"

namespace graft::kernels {
namespace {

using Draw = void (*)(const at::Tensor&, Key, uint64_t);
void mask(const at::Tensor& out, Key key, uint64_t offset) { dropout_mask(out, key, 0.3, offset); }
const std::vector<Draw> kDraws = {uniform, normal, mask};

struct PhiloxCase {
  philox::Words counter;
  uint32_t key[2];
  philox::Words expected;
};

// kat_vectors of Random123 1.14, "philox4x32 10".
const PhiloxCase kKnownAnswers[] = {
    {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
    {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
     {0xffffffff, 0xffffffff},
     {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
    {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
     {0xa4093822, 0x299f31d0},
     {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}}};

TEST(Philox, GivesThePublishedVectors) {
  for (const PhiloxCase& c : kKnownAnswers) {
    const philox::Words got = philox::rounds10(c.counter, c.key[0], c.key[1]);
    EXPECT_TRUE(std::equal(got.v, got.v + 4, c.expected.v));
  }
}

TEST(Philox, CountsBlocksAndStreamsInTheCounterUnderTheSeed) {
  const PhiloxCase& pi = kKnownAnswers[2];
  const philox::Words got =
      philox::words({0x299f31d0a4093822, 0x0370734413198a2e}, 0x85a308d3243f6a88);
  EXPECT_TRUE(std::equal(got.v, got.v + 4, pi.expected.v));
}

TEST(SplitMix64, GivesTheReferenceSequence) {
  // The reference generator seeded with 1234567: its state moves by the golden gamma.
  const uint64_t gamma = 0x9E3779B97F4A7C15u;
  EXPECT_EQ(splitmix64(1234567), 6457827717110365317u);
  EXPECT_EQ(splitmix64(1234567 + gamma), 3203168211198807973u);
  EXPECT_EQ(splitmix64(1234567 + 2 * gamma), 9817491932198370423u);
}

TEST(DeriveKey, DependsOnEveryNumberAndTheirOrder) {
  const Key key{7, 0};
  EXPECT_EQ(derive(key, 1, 2).stream, derive(derive(key, 1), 2).stream);
  EXPECT_NE(derive(key, 1, 2).stream, derive(key, 2, 1).stream);
  EXPECT_NE(derive(key, 0).stream, derive(key, 0, 0).stream);
  EXPECT_EQ(derive(key, 5).seed, 7u);
}

TEST(Uniform, IsTheUpper24BitsOfTheWords) {
  const at::Tensor out = at::empty({4});
  uniform(out, {0, 0});
  const uint32_t words[] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(out[i].item<float>(), static_cast<float>((words[i] >> 8) / 16777216.0));
  }
}

TEST(Random, DoesNotDependOnThreadsOrChunks) {
  const Key key{42, 9};
  const int threads = at::get_num_threads();
  for (const Draw draw : kDraws) {
    const at::Tensor whole = at::empty({100'003}), one_thread = at::empty_like(whole);
    const at::Tensor pieces = at::empty_like(whole);
    at::set_num_threads(2);
    draw(whole, key, 5);
    at::set_num_threads(1);
    draw(one_thread, key, 5);
    for (int64_t begin = 0; begin < whole.numel(); begin += 33'337) {
      const int64_t end = std::min(begin + 33'337, whole.numel());
      draw(pieces.slice(0, begin, end), key, 5 + begin);
    }
    EXPECT_TRUE(whole.equal(one_thread));
    EXPECT_TRUE(whole.equal(pieces));
  }
  at::set_num_threads(threads);
}

TEST(Random, DiffersBySeedAndByStream) {
  for (const Draw draw : kDraws) {
    const at::Tensor a = at::empty({1000}), b = at::empty({1000}), c = at::empty({1000});
    draw(a, {1, 1}, 0);
    draw(b, {2, 1}, 0);
    draw(c, {1, 2}, 0);
    EXPECT_FALSE(a.equal(b));
    EXPECT_FALSE(a.equal(c));
  }
}

// A mean of n draws strays by more than 5 standard errors once in 1.7 million keys; the key is
// fixed.
TEST(Normal, HasTheMomentsOfAStandardNormal) {
  const int64_t n = 1'000'000;
  const at::Tensor out = at::empty({n});
  normal(out, {3, 4});
  const at::Tensor x = out.to(at::kDouble);
  const double moments[] = {0, 1, 0, 3}, variances[] = {1, 2, 15, 96};
  for (int k = 0; k < 4; ++k) {
    EXPECT_NEAR(x.pow(k + 1).mean().item<double>(), moments[k], 5 * std::sqrt(variances[k] / n));
  }
  EXPECT_NEAR((x.slice(0, 0, n, 2) * x.slice(0, 1, n, 2)).mean().item<double>(), 0,
              5 * std::sqrt(2.0 / n));
  EXPECT_LT(x.abs().max().item<double>(), 5.8);
}

TEST(Normal, IsTheBoxMullerTransformOfTheUniforms) {
  const at::Tensor u = at::empty({4096}), z = at::empty({4096});
  uniform(u, {5, 6});
  normal(z, {5, 6});
  const at::Tensor pairs = u.to(at::kDouble).view({-1, 2});
  const at::Tensor radius = ((pairs.select(1, 0) + std::ldexp(1.0, -24)).log() * -2).sqrt();
  const at::Tensor angle = pairs.select(1, 1) * (2 * M_PI);
  const at::Tensor expected = at::stack({radius * angle.cos(), radius * angle.sin()}, 1).view({-1});
  EXPECT_LT((z - expected).abs().max().item<double>(), 2e-6);
}

TEST(DropoutMask, KeepsTheMeanAndDropsTheGivenShare) {
  const int64_t n = 1'000'000;
  const at::Tensor out = at::empty({n});
  dropout_mask(out, {8, 8}, 0.25);
  const double dropped = (out == 0).to(at::kDouble).mean().item<double>();
  EXPECT_NEAR(dropped, 0.25, 5 * std::sqrt(0.25 * 0.75 / n));
  EXPECT_TRUE(((out == 0) | (out == static_cast<float>(1 / 0.75))).all().item<bool>());
}

TEST(DropoutMask, IsAllOnesAtProbabilityZero) {
  const at::Tensor out = at::empty({1000});
  dropout_mask(out, {8, 8}, 0.0);
  EXPECT_TRUE((out == 1).all().item<bool>());
}

TEST(Random, RefusesWhatItCannotFill) {
  EXPECT_THROW(uniform(at::empty({4}, at::kHalf), {1, 1}), Error);
  EXPECT_THROW(uniform(at::empty({4, 4}).t(), {1, 1}), Error);
  EXPECT_THROW(dropout_mask(at::empty({4}), {1, 1}, 1.0), Error);
  EXPECT_THROW(dropout_mask(at::empty({4}), {1, 1}, -0.1), Error);
}

}  // namespace
}  // namespace graft::kernels
