// rms_norm against its formula in LibTorch's autograd: float64, and step by step in bfloat16.
#include "kernels/rms_norm/rms_norm.h"

#include "configs/check.h"
#include "tests/kernels/near.h"

namespace graft::kernels {
namespace {

constexpr double kEpsilon = 1e-5;

/// Hugging Face's LlamaRMSNorm, line by line; exact when everything is float64.
at::Tensor composed(const at::Tensor& x, const at::Tensor& weight, at::ScalarType inner) {
  const at::Tensor wide = x.to(inner);
  const at::Tensor variance = wide.pow(2).mean(-1, true);
  return weight * (wide * at::rsqrt(variance + kEpsilon)).to(x.scalar_type());
}

void expect_agreement(at::ScalarType type, int64_t width) {
  at::manual_seed(2);
  const at::Tensor x = leaf(at::randn({3, 5, width}) * 3, type);
  const at::Tensor weight = leaf(at::rand({width}) + 0.5, type);
  const at::Tensor d_y = at::randn({3, 5, width}).to(type);
  const at::Tensor y = rms_norm(x, weight, kEpsilon);
  y.backward(d_y);
  const at::Tensor exact_x = leaf(x, at::kDouble), exact_weight = leaf(weight, at::kDouble);
  const at::Tensor expected = composed(exact_x, exact_weight, at::kDouble);
  expected.backward(d_y.to(at::kDouble));
  expect_near(y.detach(), expected.detach());
  expect_near(x.grad(), exact_x.grad());
  expect_near(weight.grad(), exact_weight.grad());
}

TEST(RmsNorm, AgreesWithFloat64InFloat32) {
  for (int64_t width : {5, 16, 576, 1000}) expect_agreement(at::kFloat, width);
}

TEST(RmsNorm, AgreesWithFloat64InBfloat16) {
  for (int64_t width : {5, 16, 576, 1000}) expect_agreement(at::kBFloat16, width);
}

TEST(RmsNorm, CastsBeforeTheWeightInBfloat16) {
  at::manual_seed(3);
  const at::Tensor x = at::randn({200, 576}).to(at::kBFloat16);
  const at::Tensor weight = (at::rand({576}) + 0.5).to(at::kBFloat16);
  const at::Tensor differs = rms_norm(x, weight, kEpsilon) != composed(x, weight, at::kFloat);
  EXPECT_LE(differs.to(at::kDouble).mean().item<double>(), 1e-3);  // sums in another order
}

TEST(RmsNorm, CastsAFloat32WeightAndReturnsItsGradientInFloat32) {
  const at::Tensor x = at::randn({4, 32}).to(at::kBFloat16);
  const at::Tensor weight = leaf(at::ones({32}), at::kFloat);
  rms_norm(x, weight, kEpsilon).sum().backward();
  EXPECT_EQ(weight.grad().scalar_type(), at::kFloat);
}

TEST(RmsNorm, HasTheSameBitsAtAnyThreadCount) {
  const at::Tensor input = at::randn({300, 577}), weight = at::rand({577});
  expect_same_bits_at_any_thread_count([&] {
    const at::Tensor x = leaf(input, at::kFloat);
    const at::Tensor y = rms_norm(x, weight, kEpsilon);
    y.backward(input);
    return std::vector<at::Tensor>{y.detach(), x.grad()};
  });
}

TEST(RmsNorm, TakesNoRowsAndRefusesAnotherWidth) {
  EXPECT_EQ(rms_norm(at::empty({0, 8}), at::ones({8}), kEpsilon).numel(), 0);
  EXPECT_THROW(rms_norm(at::empty({2, 8}), at::ones({7}), kEpsilon), Error);
}

}  // namespace
}  // namespace graft::kernels
