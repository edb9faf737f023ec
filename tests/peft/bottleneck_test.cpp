// Bottleneck adapters against their formula, written out element by element, and which of them
// rest: in steps, and after training.
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

/// Logits of a bottleneck adapter that `directory` holds.
Tensor logits_of(const std::string& directory, const char* options) {
  Tiny tiny("llama");
  std::shared_ptr<Method> method = methods().make("adapter_drop");
  read_fields(*method, options);
  tiny.attach("adapter_drop", method, directory);
  models::LoadOptions unquantised;
  unquantised.quantization = models::Quantization::kNone;
  tiny.load(unquantised);
  return tiny.logits(make_lane(0).batch);
}

TEST(Bottleneck, ARawTapReadsTheResidualStream) {
  const OneSlot slot("bottleneck",
                     "{sites: [mlp, block], form: parallel, tap: raw, non_linearity: relu}");
  const Tensor x = fill("x", {1, 1, 48}, 1), stream = fill("stream", {1, 1, 48}, 2);
  const auto relu = [](double v) { return std::max(v, 0.0); };
  models::Pass pass;
  pass.residual_BLD = stream;
  for (const char* name : {"block.0.mlp", "block.0"}) {  // a block's input is the stream
    auto& adapter = adapter_at(slot.tiny, name);
    const Tensor a = std::string(name) == "block.0" ? x : stream;
    const Tensor difference =
        adapter.forward(x, doubled, pass) - by_hand(adapter, a, doubled(x), relu, 1);
    EXPECT_LT(difference.abs().max().item<double>(), 1e-5) << name;
  }
  models::io::expect_refused([] { OneSlot("bottleneck", "{tap: raw}"); }, "tap: raw is of",
                             ExitCode::kUsage);
}

TEST(Bottleneck, HoulsbysStartIsANormalCutAtTwoDeviations) {
  Tiny tiny("llama");
  std::shared_ptr<Method> method = methods().make("bottleneck");
  read_fields(*method, "{init_weights: houlsby, reduction_factor: 1}");
  tiny.attach("bottleneck", method);
  tiny.load();
  for (const Param& p : tiny.params()) {
    const double largest = p.value.abs().max().item<double>();
    if (!p.name.ends_with("weight")) {
      EXPECT_EQ(largest, 0) << p.name;
      continue;
    }
    EXPECT_LE(largest, 0.02) << p.name;
    EXPECT_GT(largest, 0.019) << p.name;
    // The deviation of a normal cut at 2: sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)) = 0.8796.
    EXPECT_NEAR(p.value.std().item<double>(), 0.008796, 0.0004) << p.name;
    EXPECT_NEAR(p.value.mean().item<double>(), 0, 0.0006) << p.name;
  }
}

TEST(AdapterDrop, DrawsFromAllLayersButOne) {
  Tiny tiny("llama");
  tiny.attach("adapter_drop", methods().make("adapter_drop"));
  tiny.load();
  EXPECT_EQ(tiny.adapters.save(0, {"base", "CAUSAL_LM", "print"}).config["drop_up_to"], 1);
  models::io::expect_refused([] { OneSlot("adapter_drop", "{drop_up_to: 2}"); },
                             "drop_up_to = 2: this model has 2 layers", ExitCode::kUsage);
}

TEST(AdapterDrop, LayersLeftOutAreNotComputedBackwards) {
  const OneSlot one("adapter_drop", "{leave_out: [0], drop_up_to: 0}");
  EXPECT_EQ(one.tiny.adapters.params().lowest_stage(), 2) << "block 1";
}

TEST(AdapterDrop, TheLowestLayersOfASavedAdapterCanBeLeftOut) {
  OneSlot one("adapter_drop", "{}");
  const TestFolder folder;
  one.tiny.save(folder.path());
  EXPECT_TRUE(at::equal(logits_of(folder.path(), "{}"), one.tiny.logits(make_lane(0).batch)));
  const at::NoGradGuard no_grad;
  for (const Param& p : one.tiny.params()) {
    if (p.name.find("block.0.") != std::string::npos) Tensor(p.value).zero_();
  }
  EXPECT_TRUE(at::equal(logits_of(folder.path(), "{skip_layers: [0]}"),
                        one.tiny.logits(make_lane(0).batch)));
  models::io::expect_refused([] { OneSlot("adapter_drop", "{skip_layers: [2]}"); },
                             "skip_layers: this model has no layer 2", ExitCode::kUsage);
}

/// Trained, then without the adapters of layer 0.
double loss_without_the_first_layer(const std::string& drop_up_to) {
  const std::vector<models::Lane> lanes = {make_lane(0), make_lane(1)};
  Tiny tiny("llama");
  std::shared_ptr<Method> method = methods().make("adapter_drop");
  read_fields(*method, "{reduction_factor: 4, skip_layers: [0], drop_up_to: " + drop_up_to + "}");
  tiny.attach("adapter_drop", method);
  tiny.load();
  for (int i = 0; i < 80; ++i) tiny.step(lanes, 2);
  tiny.training = false;
  return tiny.sweep(lanes, 2).loss;
}

TEST(AdapterDrop, TrainedRobustlyItLosesLessWithoutItsLowestLayers) {
  EXPECT_LT(loss_without_the_first_layer("auto"), 0.8 * loss_without_the_first_layer("0"));
}

TEST(Bottleneck, TheSameLayersRestInAllLanesAndNoneWhenNotTraining) {
  const OneSlot one("bottleneck", "{drop_up_to: 1}");
  const Tensor x = fill("x", {1, 2, 48}, 1), base = doubled(x);
  int resting[2] = {};
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
  for (const int n : resting) EXPECT_NEAR(n, 150, 30);  // 3 standard deviations are 26
  models::Pass pass;
  pass.step_random = {7, 1};
  EXPECT_FALSE(at::equal(adapter_at(one.tiny, "block.0.mlp").forward(x, doubled, pass), base));
}

TEST(Bottleneck, AStepWithRestingLayersHasZeroGradientsThere) {
  OneSlot one("bottleneck", "{drop_up_to: 1}");
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
