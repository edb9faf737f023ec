// Fusing: against least squares over the inputs themselves, and what it promises of concepts.
#include "launcher/fuse.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace graft::launcher {
namespace {

using at::Tensor;

/// Numbers without a pattern, in [-1, 1).
Tensor numbers(at::IntArrayRef shape, int64_t salt) {
  const Tensor i = at::arange(c10::multiply_integers(shape), at::kDouble) + 1000.0 * salt;
  return ((i * 12.9898).sin() * 43758.5453).frac().reshape(shape);
}

FusionPart part(const Tensor& update, const Tensor& inputs_NI) {
  return {update, inputs_NI.t().mm(inputs_NI)};
}

double error(const Tensor& update, const FusionPart& wanted, const Tensor& inputs_NI) {
  const Tensor own = inputs_NI.mm(wanted.update.t());
  return ((inputs_NI.mm(update.t()) - own).norm() / own.norm()).item<double>();
}

TEST(Fuse, IsLeastSquaresOverTheInputsWithTheBaseAsPrior) {
  const Tensor x1 = numbers({30, 8}, 1), x2 = numbers({20, 8}, 2);
  const Tensor d1 = numbers({5, 8}, 3), d2 = numbers({5, 8}, 4);
  constexpr double kEpsilon = 0.05;
  // min |[X1; X2; sqrt(e) I] D^T - [X1 D1^T; X2 D2^T; 0]|, row by row.
  const double e = kEpsilon * (x1.square().sum() + x2.square().sum()).item<double>() / 8;
  const Tensor rows = at::cat({x1, x2, std::sqrt(e) * at::eye(8, at::kDouble)});
  const Tensor wanted = at::cat({x1.mm(d1.t()), x2.mm(d2.t()), at::zeros({8, 5}, at::kDouble)});
  const Tensor expected = std::get<0>(at::linalg_lstsq(rows, wanted)).t();
  EXPECT_TRUE(at::allclose(fuse({part(d1, x1), part(d2, x2)}, kEpsilon), expected, 1e-8, 1e-10));
}

TEST(Fuse, OneConceptIsItselfOnItsInputs) {
  const Tensor x = numbers({6, 8}, 1);  // fewer than the width: nothing is known of the rest
  const FusionPart only = part(numbers({5, 8}, 3), x);
  const Tensor fused = fuse({only}, 1e-8);
  EXPECT_LT(error(fused, only, x), 1e-5);
  EXPECT_LT(lost_share(fused, {only}), 1e-9);
}

TEST(Fuse, ConceptsOfOrthogonalInputsAreBothKeptAndAMeanKeepsNeither) {
  Tensor x1 = numbers({20, 8}, 1), x2 = numbers({20, 8}, 2);
  x1.slice(1, 4).zero_(), x2.slice(1, 0, 4).zero_();
  const FusionPart a = part(numbers({5, 8}, 3), x1), b = part(numbers({5, 8}, 4), x2);
  const Tensor fused = fuse({a, b}, 1e-8), mean = (a.update + b.update) / 2;
  EXPECT_LT(error(fused, a, x1), 1e-4);
  EXPECT_LT(error(fused, b, x2), 1e-4);
  EXPECT_GT(error(mean, a, x1), 0.1);
  EXPECT_GT(lost_share(mean, {a, b}), 100 * lost_share(fused, {a, b}));
}

TEST(Fuse, WithoutInputsTheMatrixStays) {
  const FusionPart nothing{numbers({5, 8}, 3), at::zeros({8, 8}, at::kDouble)};
  EXPECT_EQ(fuse({nothing}, 1e-4).abs().max().item<double>(), 0);
}

}  // namespace
}  // namespace graft::launcher
