// MPO against its definition, element by element, and its decomposition against the matrix.
#include <gtest/gtest.h>

#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

/// The matrix of an operator: each element is a product of small matrices.
Tensor matrix_of(const std::vector<Tensor>& tensors, const Tensor& like) {
  Tensor w = at::zeros_like(like);
  for (int64_t row = 0; row < w.size(0); ++row) {
    for (int64_t column = 0; column < w.size(1); ++column) {
      int64_t i = row, j = column, rows = w.size(0), columns = w.size(1);
      Tensor product = at::ones({1, 1});
      for (const Tensor& t : tensors) {
        rows /= t.size(1), columns /= t.size(2);
        product = product.mm(t.select(2, j / columns).select(1, i / rows));
        i %= rows, j %= columns;
      }
      w[row][column] = product[0][0];
    }
  }
  return w;
}

std::vector<Tensor> tensors_of(const OneSlot& slot, const std::string& name, int sites) {
  std::vector<Tensor> tensors;
  for (int k = 0; k < sites; ++k)
    tensors.push_back(slot.value((k == sites / 2 ? "mpo_start_" : name) + std::to_string(k)));
  return tensors;
}

TEST(Mpo, IsItsDefinition) {
  const OneSlot slot("mpo", "{target_modules: q_proj, sites: 4, bond: 5}");
  const Tensor w = slot.weight(), x = fill("x", {2, 3, w.size(1)}, 1);
  const Tensor expected = w + matrix_of(tensors_of(slot, "mpo_core_", 4), w) -
                          matrix_of(tensors_of(slot, "mpo_start_", 4), w);
  EXPECT_TRUE(at::allclose(slot.forward(x), at::linear(x, expected), 1e-4, 1e-5));
}

TEST(Mpo, AtFullBondsItStartsAtTheMatrix) {
  const OneSlot slot("mpo", "{target_modules: q_proj, sites: 3, bond: 4096}");
  const Tensor w = slot.weight();
  EXPECT_TRUE(at::allclose(matrix_of(tensors_of(slot, "mpo_start_", 3), w), w, 1e-4, 1e-5));
}

/// W as (i_1 j_1) by the rest.
Tensor cut_behind_the_first(const Tensor& w, const Tensor& first) {
  return w.view({first.size(1), -1, first.size(2), w.size(1) / first.size(2)})
      .permute({0, 2, 1, 3})
      .reshape({first.size(1) * first.size(2), -1});
}

TEST(Mpo, OneCutBondLosesExactlyTheDiscardedSingularValues) {
  // 96 = 6 4 4 and 48 = 3 4 4: of the bonds 18 and 16 only the first is cut.
  const OneSlot slot("mpo", "{target_modules: q_proj, sites: 3, bond: 16}");
  const Tensor w = slot.weight(), first = slot.value("mpo_start_0");
  ASSERT_EQ(slot.value("mpo_start_2").size(0), 16);
  const Tensor s = at::linalg_svdvals(cut_behind_the_first(w, first));
  const double lost = (matrix_of(tensors_of(slot, "mpo_start_", 3), w) - w).norm().item<double>();
  const double discarded = s.slice(0, 16).norm().item<double>();
  EXPECT_EQ(s.size(0), 18);
  EXPECT_GT(discarded, 0.1);
  EXPECT_NEAR(lost, discarded, 1e-4 * discarded);
}

TEST(Mpo, TheCentreIsNeverTrained) {
  OneSlot slot("mpo", "{sites: 3}");
  const Tensor centre = slot.value("mpo_start_1").clone();
  for (const Param& p : slot.tiny.params()) EXPECT_FALSE(p.name.ends_with("_1")) << p.name;
  slot.tiny.step({make_lane(0)}, 1);
  EXPECT_FALSE(slot.adapter().named_buffers()["mpo_start_1"].requires_grad());
  EXPECT_FALSE(slot.adapter().named_buffers()["mpo_start_1"].grad().defined());
  EXPECT_TRUE(at::equal(slot.value("mpo_start_1"), centre));
}

TEST(Mpo, ACutBondLosesTheDiscardedSingularValues) {
  // Three tensors with the left bond cut: W as (i_1 j_1) by the rest has few singular values.
  const OneSlot slot("mpo", "{target_modules: q_proj, sites: 3, bond: 9}");
  const Tensor w = slot.weight(), first = slot.value("mpo_start_0");
  const double least =
      at::linalg_svdvals(cut_behind_the_first(w, first)).slice(0, 9).norm().item<double>();
  const double lost = (matrix_of(tensors_of(slot, "mpo_start_", 3), w) - w).norm().item<double>();
  EXPECT_GE(lost, least - 1e-4);
  EXPECT_LE(lost, 2 * least);
}

}  // namespace
}  // namespace graft::peft
