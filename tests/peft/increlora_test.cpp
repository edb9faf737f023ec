// IncreLoRA: its scores against the gradient of the whole matrix, and when and where ranks grow.
#include <gtest/gtest.h>

#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

Tensor tensor_of(const Tiny& tiny, const std::string& slot, const std::string& leaf) {
  for (const auto& p : tiny.params()) {
    if (p.name == "0." + slot + "." + leaf) return p.value;
  }
  for (const auto& c : tiny.adapters.params().constants()) {
    if (c.name == "0." + slot + "." + leaf) return c.value;
  }
  ADD_FAILURE() << "no " << slot << "." << leaf;
  return {};
}

int64_t num_ranks(const Tiny& tiny) {
  int64_t count = 0;
  for (const auto& c : tiny.adapters.params().constants()) {
    if (c.name.ends_with(".ranks")) count += c.value.item<int64_t>();
  }
  return count;
}

TEST(Increlora, TheScoreIsThatOfTheWholeUpdate) {
  const OneSlot slot("increlora", "{lora_r: 3, target_r: 5, max_r: 5, lora_alpha: 6}");
  const Tensor w = slot.weight(), x = fill("x", {2, 3, w.size(1)}, 1);
  const Tensor dy = fill("dy", {2, 3, w.size(0)}, 1);
  // By its definition: D a matrix of its own, of 3 ranks in use and 2 in reserve.
  const Tensor a = slot.value("lora_a"), b = slot.value("lora_b"), e = slot.value("lora_e");
  const Tensor d = (6 / (3 + 1e-5) * b.mm(e * a)).requires_grad_();
  at::linear(x, w + d).backward(dy);
  const double expected = (d * d.grad()).abs().sum().item<double>() / std::sqrt(w.numel());

  models::Pass pass;
  pass.training = true;
  const Tensor y = slot.adapter().forward(x, Dense(w, slot.bias()), pass);
  EXPECT_TRUE(at::allclose(y, at::linear(x, w + d, slot.bias()), 1e-4, 1e-5));
  y.backward(dy);
  const Tensor score = slot.adapter().named_parameters()["score"];
  EXPECT_NEAR(score.grad().item<double>() * 0x1p40, expected, 1e-4 * expected);
}

TEST(Increlora, ClippingGradientsChangesNoScore) {
  const auto importance = [](double factor) {
    OneSlot slot("increlora", "{target_modules: all-linear}");
    const auto gradients = slot.tiny.sweep({make_lane(0)}, 1).gradients;
    slot.tiny.adapters.after_reduce({0, 100});
    for (Tensor gradient : gradients) gradient.mul_(factor);  // as the trainer clips
    slot.tiny.optimizer->step(gradients, 1e-2);
    slot.tiny.adapters.after_step({0, 100});
    std::vector<Tensor> found;
    for (const auto& c : slot.tiny.adapters.params().constants()) {
      if (c.name.ends_with("importance")) found.push_back(c.value.clone());
    }
    return at::cat(found);
  };
  EXPECT_GT(importance(1).min().item<double>(), 0);
  EXPECT_TRUE(at::equal(importance(1e-3), importance(1)));
}

TEST(Increlora, WeightDecayLeavesRanksThatDoNotLearnYetAsTheyWereDrawn) {
  for (const bool ahead : {true, false}) {
    OneSlot slot("increlora", ahead ? "{max_r: 4}" : "{max_r: 4, advance_learn: false}");
    Tiny& tiny = slot.tiny;
    tiny.optimizer = std::make_unique<launcher::AdamW>(tiny.adapters.params(),
                                                       launcher::StepConfig{.weight_decay = 0.1});
    const std::string q = "block.0.attn.q";
    const Tensor a = tensor_of(tiny, q, "lora_a"), b = tensor_of(tiny, q, "lora_b");
    const Tensor a_before = a.detach().clone(), b_before = b.detach().clone();
    for (int step = 0; step < 5; ++step) tiny.step({make_lane(0)}, 1);
    const int64_t idle = ahead ? 2 : 1;  // one in use, and one in reserve
    EXPECT_TRUE(at::equal(a.slice(0, idle), a_before.slice(0, idle)));
    EXPECT_TRUE(at::equal(b.slice(1, idle), b_before.slice(1, idle)));
    EXPECT_FALSE(at::equal(a[idle - 1], a_before[idle - 1]));
  }
}

TEST(Increlora, RanksGrowByTopHEveryIntervalUpToTheTarget) {
  OneSlot slot("increlora",
               "{target_modules: all-linear, lora_r: 1, target_r: 2, init_warmup: 3,"
               " incre_interval: 2, top_h: 4}");
  const auto slots = static_cast<int64_t>(slot.tiny.params().size()) / 4;
  for (int64_t step = 1; step <= 13; ++step) {
    slot.tiny.step({make_lane(0)}, 1);
    const int64_t growths = std::max<int64_t>(step / 2 - 1, 0);
    EXPECT_EQ(num_ranks(slot.tiny), std::min(slots + 4 * growths, 2 * slots)) << "step " << step;
  }
}

TEST(Increlora, TheSlotThatTheLossNeedsGrowsFirst) {
  OneSlot slot("increlora",
               "{target_modules: all-linear, init_warmup: 2, incre_interval: 3, top_h: 1}");
  tensor_of(slot.tiny, "block.1.mlp.up", "lora_e").detach().fill_(20);
  for (int step = 1; step <= 3; ++step) slot.tiny.step({make_lane(0)}, 1);
  EXPECT_EQ(tensor_of(slot.tiny, "block.1.mlp.up", "ranks").item<int64_t>(), 2);
  EXPECT_EQ(num_ranks(slot.tiny), static_cast<int64_t>(slot.tiny.params().size()) / 4 + 1);
}

TEST(Increlora, GrowthChangesNothingWhereTheScaleStays) {
  const auto change = [](const std::string& scale_by) {
    OneSlot slot("increlora",
                 "{init_warmup: 0, incre_interval: 2, top_h: 100, scale_by: " + scale_by + "}");
    slot.tiny.step({make_lane(0)}, 1);
    slot.tiny.step({make_lane(0)}, 1, 0);  // nothing is learnt as they grow
    const Tensor after = slot.tiny.logits(make_lane(0).batch);
    const at::NoGradGuard no_grad;
    for (const auto& c : slot.tiny.adapters.params().constants()) {
      if (!c.name.ends_with(".ranks")) continue;
      EXPECT_EQ(c.value.item<int64_t>(), 2) << c.name;
      Tensor(c.value).fill_(1);
    }
    return (slot.tiny.logits(make_lane(0).batch) - after).abs().max().item<double>();
  };
  EXPECT_LT(change("initial_rank"), 1e-3);
  EXPECT_GT(change("current_rank"), 1e-2);
}

TEST(Increlora, ReservesLearnAheadAndEndAtZero) {
  OneSlot slot("increlora",
               "{init_warmup: 2, incre_interval: 2, top_h: 100, lora_r: 1, target_r: 2}");
  const std::string q = "block.0.attn.q";
  slot.tiny.step({make_lane(0)}, 1);
  const Tensor e = tensor_of(slot.tiny, q, "lora_e"), a = tensor_of(slot.tiny, q, "lora_a");
  EXPECT_EQ(e[1].item<float>(), 1e-5F);
  const Tensor before = a.clone();
  slot.tiny.step({make_lane(0)}, 1);
  EXPECT_FALSE(at::equal(a[1], before[1]));
  EXPECT_TRUE(at::equal(a[3], before[3])) << "neither in use nor in reserve";
  for (int step = 3; step <= 5; ++step) slot.tiny.step({make_lane(0)}, 1);
  EXPECT_EQ(num_ranks(slot.tiny), static_cast<int64_t>(slot.tiny.params().size()) / 2);
  EXPECT_NE(e[1].item<float>(), 1e-5F);  // in use, and trained
  EXPECT_EQ(e[2].item<float>(), 0);
}

}  // namespace
}  // namespace graft::peft
