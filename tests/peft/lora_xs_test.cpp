// LoRA-XS against its definition, and its frozen factors against the singular value decomposition.
#include <gtest/gtest.h>

#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

TEST(LoraXs, IsItsDefinition) {
  const OneSlot slot("lora_xs", "{r: 5, alpha: 10}");
  const Tensor r = slot.value("lora_xs_r"), a = slot.value("lora_xs_a");
  const Tensor b = slot.value("lora_xs_b"), x = fill("x", {2, 3, slot.site().info.in}, 1);
  const Tensor w = slot.weight() + 2 * b.mm(r).mm(a);
  EXPECT_TRUE(at::allclose(slot.forward(x), at::linear(x, w), 1e-4, 1e-5));
}

TEST(LoraXs, AutogradKeepsNoInputOfFullWidth) {
  const OneSlot slot("lora_xs", "{r: 5}");
  const Tensor leaf = fill("x", {7, slot.site().info.in}, 1).requires_grad_();
  Tensor x = leaf + 1;
  const Dense base(slot.weight(), slot.bias());
  const Tensor y = slot.adapter().forward(x, base, models::Pass());
  const at::Storage storage = x.storage();
  x.reset();
  EXPECT_EQ(storage.use_count(), 1) << "the graph of y holds x";
  y.square().sum().backward();
  EXPECT_GT(leaf.grad().abs().max().item<double>(), 0);
}

TEST(LoraXs, FactorsAreTheBestOfTheirRank) {
  for (const int64_t r : {1, 5, 40, 48}) {
    const OneSlot slot("lora_xs", "{target_modules: q_proj, r: " + std::to_string(r) + "}");
    const Tensor a = slot.value("lora_xs_a"), b = slot.value("lora_xs_b"), w = slot.weight();
    const Tensor s = at::linalg_svdvals(w);
    EXPECT_NEAR((w - b.mm(a)).norm().item<double>(), s.slice(0, r).norm().item<double>(), 2e-2)
        << r;
    EXPECT_TRUE(at::allclose(a.mm(a.t()), at::eye(r), 1e-4, 1e-5)) << "A has orthonormal rows";
    EXPECT_TRUE(at::allclose(b.norm(2, 0)[0], s[0], 1e-3, 1e-4)) << "B is U S";
  }
}

TEST(LoraXs, ARankAboveTheMatrixIsRefused) {
  models::io::expect_refused([] { OneSlot("lora_xs", "{r: 49}"); }, "r = 49, at most 48",
                             ExitCode::kUsage);
}

}  // namespace
}  // namespace graft::peft
