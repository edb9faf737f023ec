// Bottleneck adapters against their formula, written out element by element, and which of them
// rest.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

models::SublayerAdapter& adapter_at(const Tiny& tiny, const std::string& name) {
  for (const auto& site : tiny.adapters.slots().sublayers) {
    if (site.name == name) return *site.slot->adapters().at(0);
  }
  throw std::logic_error(name);
}

Tensor doubled(const Tensor& x) { return x * 2 + 1; }

/// o + s (U f(D a + b) + c), by sums.
Tensor by_hand(const models::SublayerAdapter& adapter, const Tensor& a, const Tensor& o,
               const std::function<double(double)>& f, double scale) {
  std::map<std::string, Tensor> p;
  for (const auto& item : adapter.named_parameters())
    p[item.key()] = item.value().detach().to(at::kDouble);
  Tensor y = o.to(at::kDouble).clone();
  const int64_t width = a.size(-1), inner = p["down_bias"].numel();
  const auto at = [](const Tensor& t, int64_t i) { return t[i].item<double>(); };
  for (int64_t d = 0; d < width; ++d) y[0][0][d] += scale * at(p["up_bias"], d);
  for (int64_t r = 0; r < inner; ++r) {
    double sum = at(p["down_bias"], r);
    for (int64_t d = 0; d < width; ++d) sum += at(p["down_weight"][r], d) * at(a[0][0], d);
    for (int64_t d = 0; d < width; ++d) y[0][0][d] += scale * f(sum) * at(p["up_weight"][d], r);
  }
  return y.to(at::kFloat);
}

TEST(Bottleneck, ReadsTheOutputOrTheInputOfItsSite) {
  const Tensor x = fill("x", {1, 1, 48}, 1);
  const auto relu = [](double v) { return std::max(v, 0.0); };
  const auto silu = [](double v) { return v / (1 + std::exp(-v)); };
  const OneSlot behind("bottleneck", "{reduction_factor: 8}");
  auto& houlsby = adapter_at(behind.tiny, "block.1.attn");
  EXPECT_LT((houlsby.forward(x, doubled, {}) - by_hand(houlsby, doubled(x), doubled(x), silu, 1))
                .abs()
                .max()
                .item<double>(),
            1e-5);
  const OneSlot beside("bottleneck",
                       "{sites: [mlp], form: parallel, reduction_factor: 2, non_linearity: relu,"
                       " scaling: 4}");
  auto& parallel = adapter_at(beside.tiny, "block.0.mlp");
  EXPECT_LT((parallel.forward(x, doubled, {}) - by_hand(parallel, x, doubled(x), relu, 4))
                .abs()
                .max()
                .item<double>(),
            1e-5);
}

TEST(Bottleneck, TheSameLayersRestInAllLanesAndNoneWhenNotTraining) {
  const OneSlot one("bottleneck", "{drop_up_to: 2}");
  const Tensor x = fill("x", {1, 2, 48}, 1), base = doubled(x);
  int resting[3] = {};
  for (uint64_t step = 0; step < 300; ++step) {
    models::Pass pass;
    pass.training = true;
    pass.step_random = {7, step};
    int count = 0;
    for (const char* name : {"block.0.mlp", "block.1.mlp"}) {
      auto& adapter = adapter_at(one.tiny, name);
      pass.random = {7, 1};
      const Tensor y = adapter.forward(x, doubled, pass);
      pass.random = {7, 2}, pass.lane = 1;
      EXPECT_TRUE(at::equal(y, adapter.forward(x, doubled, pass)));
      const bool rests = at::equal(y, base);
      EXPECT_TRUE(!rests || count == (name[6] == '1' ? 1 : 0)) << "layers below the n-th rest";
      count += rests ? 1 : 0;
    }
    ++resting[count];
  }
  for (const int n : resting) EXPECT_NEAR(n, 100, 30);  // 3 standard deviations are 25
  models::Pass pass;
  pass.step_random = {7, 1};
  EXPECT_FALSE(at::equal(adapter_at(one.tiny, "block.0.mlp").forward(x, doubled, pass), base));
}

TEST(Bottleneck, AStepWithRestingLayersHasZeroGradientsThere) {
  OneSlot one("bottleneck", "{drop_up_to: 2}");
  int with_zeros = 0;
  for (int step = 0; step < 6; ++step) {
    one.tiny.optimizer->set_num_steps(step);
    const auto result = one.tiny.sweep({make_lane(0), make_lane(1)}, 2);
    bool zeros = false;
    for (size_t i = 0; i < result.gradients.size(); ++i)
      zeros = zeros || result.gradients[i].abs().max().item<double>() == 0;
    with_zeros += zeros ? 1 : 0;
  }
  EXPECT_GT(with_zeros, 0);
  EXPECT_LT(with_zeros, 6);
}

}  // namespace
}  // namespace graft::peft
