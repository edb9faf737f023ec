// Delta-LoRA against the matrix written out step by step, as the paper has it.
#include <gtest/gtest.h>

#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

TEST(DeltaLora, IsTheMatrixThatFollowsItsFactors) {
  constexpr double kLambda = 2, kScale = 12.0 / 4;
  OneSlot slot("delta_lora",
               "{target_modules: attn.q, r: 4, lora_alpha: 12, "
               "update_ratio: 2, start_steps: 2}");
  const auto product = [&] {
    return slot.value("lora_b").to(at::kDouble).mm(slot.value("lora_a").to(at::kDouble));
  };
  const Tensor x = fill("x", {3, slot.site().info.in}, 1);
  Tensor w = slot.weight().to(at::kDouble);
  for (int step = 0; step < 100; ++step) {
    const Tensor before = product();
    slot.tiny.step({make_lane(0)}, 1);
    if (step >= 2) w = w + kLambda * kScale * (product() - before);
    const Tensor expected = at::linear(x.to(at::kDouble), w + kScale * product());
    const double error = (slot.forward(x) - expected).abs().max().item<double>();
    EXPECT_LT(error, 1e-5 * expected.abs().max().item<double>()) << step;
  }
  EXPECT_GT((w - slot.weight()).abs().max().item<double>(), 1e-2);
}

}  // namespace
}  // namespace graft::peft
