// lowrank_add against base + scale x A^T B^T of LibTorch's autograd in float64.
#include "kernels/lowrank/lowrank.h"

#include "configs/check.h"
#include "kernels/gemm/gemm.h"
#include "tests/kernels/near.h"

namespace graft::kernels {
namespace {

constexpr double kScale = 1.75;

struct Leaves {
  at::Tensor base, x, a, b;
  Leaves(at::ScalarType activations, at::ScalarType adapter) {
    at::manual_seed(9);
    base = leaf(at::randn({2, 5, 24}), activations);
    x = leaf(at::randn({2, 5, 40}), activations);
    a = leaf(at::randn({8, 40}), adapter);
    b = leaf(at::randn({24, 8}), adapter);
  }
  Leaves(const Leaves& other, at::ScalarType type)
      : base(leaf(other.base, type)),
        x(leaf(other.x, type)),
        a(leaf(other.a, type)),
        b(leaf(other.b, type)) {}
};

void expect_agreement(at::ScalarType activations, at::ScalarType adapter) {
  const Leaves ours(activations, adapter), exact(ours, at::kDouble);
  const at::Tensor y = lowrank_add(ours.base * 1, ours.x, ours.a, ours.b, kScale);
  const at::Tensor d_y = at::randn(y.sizes()).to(activations);
  y.backward(d_y);
  const at::Tensor expected = exact.base + kScale * exact.x.matmul(exact.a.t()).matmul(exact.b.t());
  expected.backward(d_y.to(at::kDouble));
  expect_near(y.detach(), expected.detach());
  expect_near(ours.base.grad(), exact.base.grad());
  const double allowed = 2 * tolerance(activations);  // the factors were cast as well
  for (auto [got, wanted] : {std::pair(ours.x, exact.x), {ours.a, exact.a}, {ours.b, exact.b}}) {
    EXPECT_EQ(got.grad().scalar_type(), got.scalar_type());
    const at::Tensor error = (got.grad().to(at::kDouble) - wanted.grad()).abs().max();
    EXPECT_LE(error.item<double>(), allowed * wanted.grad().abs().max().item<double>());
  }
}

TEST(LowrankAdd, AgreesWithFloat64) {
  expect_agreement(at::kDouble, at::kDouble);
  expect_agreement(at::kFloat, at::kFloat);
  expect_agreement(at::kBFloat16, at::kBFloat16);
}

TEST(LowrankAdd, KeepsFloat32GradientsUnderBfloat16Activations) {
  expect_agreement(at::kBFloat16, at::kFloat);
}

TEST(LowrankAdd, WritesIntoTheBaseOutput) {
  const Leaves t(at::kFloat, at::kFloat);
  at::Tensor base = t.base.detach().clone();
  const at::Tensor y = lowrank_add(base, t.x, t.a, t.b, kScale);
  EXPECT_EQ(y.data_ptr(), base.data_ptr());
}

TEST(LowrankAdd, StacksOnOneOutput) {
  const Leaves t(at::kDouble, at::kDouble);
  at::Tensor y = lowrank_add(t.base * 1, t.x, t.a, t.b, kScale);
  y = lowrank_add(y, t.x, t.a, t.b, kScale);
  y.sum().backward();
  const Leaves exact(t, at::kDouble);
  (exact.base + 2 * kScale * exact.x.matmul(exact.a.t()).matmul(exact.b.t())).sum().backward();
  expect_near(t.a.grad(), exact.a.grad());
  expect_near(t.x.grad(), exact.x.grad());
}

TEST(LowrankAdd, TakesAViewOfTheBaseOutput) {  // what a linear layer returns: mm(...).view(...)
  const Leaves t(at::kDouble, at::kDouble), exact(t, at::kDouble);
  const at::Tensor base = (t.base.view({10, 24}) * 2).view({2, 5, 24});
  lowrank_add(base, t.x, t.a, t.b, kScale).sum().backward();
  (exact.base * 2 + kScale * exact.x.matmul(exact.a.t()).matmul(exact.b.t())).sum().backward();
  expect_near(t.base.grad(), exact.base.grad());
  expect_near(t.b.grad(), exact.b.grad());
}

TEST(LowrankAdd, TakesNoRows) {
  const Leaves t(at::kFloat, at::kFloat);
  lowrank_add(at::empty({0, 24}), at::empty({0, 40}), t.a, t.b, kScale).sum().backward();
  EXPECT_TRUE(at::equal(t.a.grad(), at::zeros_like(t.a)));
}

TEST(LowrankAdd, RefusesShapesAndDtypesThatDoNotFit) {
  const at::Tensor a = at::zeros({8, 40}), b = at::zeros({24, 8}), x = at::zeros({5, 40});
  EXPECT_THROW(lowrank_add(at::zeros({5, 23}), x, a, b, 1), Error);
  EXPECT_THROW(lowrank_add(at::zeros({4, 24}), x, a, b, 1), Error);
  EXPECT_THROW(lowrank_add(at::zeros({5, 24}), x, a, at::zeros({24, 7}), 1), Error);
  EXPECT_THROW(lowrank_add(at::zeros({5, 24}, at::kBFloat16), x, a, b, 1), Error);
}

TEST(Gemm, APartOfAMatrixGivesTheBitsOfItsCopy) {
  const at::Tensor x = at::arange(24 * 32).remainder(17).view({24, 32}).to(at::kFloat) / 7 - 1;
  const at::Tensor wide = at::arange(40 * 80).remainder(29).view({40, 80}).to(at::kFloat) / 13 - 1;
  for (const at::Tensor& part : {wide.slice(1, 3, 35), wide.slice(1, 0, 40).t().slice(1, 4, 36)}) {
    EXPECT_TRUE(at::equal(gemm_linear(x, part), gemm_linear(x, part.contiguous())));
  }
}

}  // namespace
}  // namespace graft::kernels
