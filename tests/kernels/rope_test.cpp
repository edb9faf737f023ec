// rope against rotate_half of Hugging Face, composed in float64, and against what a rotation must
// keep.
#include "kernels/rope/rope.h"

#include "configs/check.h"
#include "tests/kernels/near.h"

namespace graft::kernels {
namespace {

/// Angles of positions [..., L] for a head of K, written twice: [..., L, K].
at::Tensor angles(const at::Tensor& positions, int64_t width) {
  const at::Tensor exponent = at::arange(0, width, 2, at::kDouble) / static_cast<double>(width);
  const at::Tensor freqs = positions.to(at::kDouble).unsqueeze(-1) * at::pow(10000.0, -exponent);
  return at::cat({freqs, freqs}, -1);
}

at::Tensor composed(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const auto halves = x.chunk(2, -1);
  return x * cos.unsqueeze(-2) + at::cat({-halves[1], halves[0]}, -1) * sin.unsqueeze(-2);
}

void expect_agreement(at::ScalarType type, int64_t width, const at::Tensor& positions) {
  at::manual_seed(4);
  const at::Tensor angle = angles(positions, width);
  const at::Tensor cos = at::cos(angle).to(at::kFloat), sin = at::sin(angle).to(at::kFloat);
  const at::Tensor x = leaf(at::randn({2, 6, 3, width}), type);
  const at::Tensor d_y = at::randn(x.sizes()).to(type);
  const at::Tensor y = rope(x, cos, sin);
  y.backward(d_y);
  const at::Tensor exact = leaf(x, at::kDouble);
  const at::Tensor expected = composed(exact, cos.to(at::kDouble), sin.to(at::kDouble));
  expected.backward(d_y.to(at::kDouble));
  expect_near(y.detach(), expected.detach());
  expect_near(x.grad(), exact.grad());
}

TEST(Rope, AgreesWithFloat64ForSharedAndPackedPositions) {
  const at::Tensor packed = at::tensor({0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 2, 3}).view({2, 6});
  for (at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    for (int64_t width : {2, 8, 64, 80}) {
      expect_agreement(type, width, at::arange(6));
      expect_agreement(type, width, packed);
    }
  }
}

TEST(Rope, TakesASliceOfAFusedProjection) {
  const at::Tensor angle = angles(at::arange(5), 16);
  const at::Tensor cos = at::cos(angle).to(at::kFloat), sin = at::sin(angle).to(at::kFloat);
  const at::Tensor fused = at::randn({2, 5, 12, 16});
  const at::Tensor slice = fused.narrow(2, 4, 3), turned = at::randn({2, 3, 5, 16}).transpose(1, 2);
  EXPECT_TRUE(at::equal(rope(slice, cos, sin), rope(slice.contiguous(), cos, sin)));
  EXPECT_TRUE(at::equal(rope(turned, cos, sin), rope(turned.contiguous(), cos, sin)));
}

TEST(Rope, MakesScoresDependOnDistanceOnly) {
  const at::Tensor angle = angles(at::arange(40), 32);
  const at::Tensor cos = at::cos(angle).to(at::kFloat), sin = at::sin(angle).to(at::kFloat);
  const at::Tensor q = rope(at::randn({32}).expand({1, 40, 1, 32}).contiguous(), cos, sin);
  const at::Tensor k = rope(at::randn({32}).expand({1, 40, 1, 32}).contiguous(), cos, sin);
  const at::Tensor scores = at::mm(q.view({40, 32}), k.view({40, 32}).t());
  EXPECT_TRUE(at::allclose(scores.narrow(0, 0, 39).narrow(1, 0, 39),
                           scores.narrow(0, 1, 39).narrow(1, 1, 39), 1e-4, 1e-4));
}

TEST(Rope, HasTheSameBitsAtAnyThreadCount) {
  const at::Tensor angle = angles(at::arange(100), 64);
  const at::Tensor cos = at::cos(angle).to(at::kFloat), sin = at::sin(angle).to(at::kFloat);
  const at::Tensor x = at::randn({3, 100, 9, 64});
  expect_same_bits_at_any_thread_count([&] { return std::vector{rope(x, cos, sin)}; });
}

TEST(Rope, TakesNoTokensAndRefusesTablesThatDoNotFit) {
  EXPECT_EQ(rope(at::empty({2, 0, 3, 8}), at::empty({0, 8}), at::empty({0, 8})).numel(), 0);
  EXPECT_THROW(rope(at::empty({1, 5, 1, 8}), at::empty({4, 8}), at::empty({4, 8})), Error);
  EXPECT_THROW(rope(at::empty({1, 5, 1, 7}), at::empty({5, 7}), at::empty({5, 7})), Error);
}

}  // namespace
}  // namespace graft::kernels
