// Methods made of others: MAM is its two parts and nothing else; what a part may not be.
#include <gtest/gtest.h>

#include "peft/compound.h"
#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

std::shared_ptr<Method> make(const std::string& name, const std::string& options) {
  std::shared_ptr<Method> method = methods().make(name);
  read_fields(*method, options);
  return method;
}

constexpr const char* kPrefix = "num_virtual_tokens: 3, encoder_hidden_size: 24";

std::string mam(const std::string& bottleneck) {
  return "{prefix_tuning: {" + std::string(kPrefix) + "}, bottleneck: {" + bottleneck + "}}";
}

TEST(Mam, WithoutItsScalingIsPrefixTuning) {
  OneSlot whole("mam", mam("scaling: 0"));
  OneSlot prefix("prefix_tuning", "{" + std::string(kPrefix) + ", prefix_projection: true}");
  const at::NoGradGuard no_grad;
  size_t count = 0;
  for (const Param& ours : prefix.tiny.params()) {
    for (const Param& p : whole.tiny.params()) {
      if (p.hf_key == ours.hf_key) Tensor(ours.value).copy_(p.value), ++count;
    }
  }
  ASSERT_EQ(count, prefix.tiny.params().size());
  const data::Batch batch = make_lane(0).batch;
  EXPECT_TRUE(at::equal(whole.tiny.logits(batch), prefix.tiny.logits(batch)));
  EXPECT_FALSE(at::equal(OneSlot("mam", mam("")).tiny.logits(batch), whole.tiny.logits(batch)));
}

TEST(Mam, WhatTheAdapterAddsIsNoFunctionOfTheMlp) {
  const OneSlot one("mam", mam(""));
  const Tensor x = fill("x", {1, 2, 48}, 1);
  for (const auto& site : one.tiny.adapters.slots().sublayers) {
    if (site.role != "mlp") continue;
    auto& adapter = *site.slot->adapters().at(0);
    const auto added = [&](const Tensor& o) {
      return adapter.forward(x, [&](const Tensor&) { return o; }, {}).detach() - o;
    };
    const Tensor a = added(fill("one", {1, 2, 48}, 1)), b = added(fill("other", {1, 2, 48}, 1));
    EXPECT_LT((a - b).abs().max().item<double>(), 1e-5);
    EXPECT_GT(a.abs().max().item<double>(), 1e-2);
  }
}

TEST(Compound, APartGoesOnFromASavedAdapterAsItWouldAlone) {
  OneSlot whole("mam", mam(""));
  const Peft::Saved saved = whole.tiny.adapters.save(0, {"base", "CAUSAL_LM", "print"});
  models::io::NamedTensors flat;  // the prefix as PEFT would hold it
  for (const auto& [key, value] : saved.tensors) {
    if (!key.starts_with("prompt_encoder.")) flat.emplace_back(key, value);
  }
  const TestFolder folder;
  Tiny::write_adapter(folder.path(), saved.config, flat, saved.metadata);
  Tiny tiny("llama");
  tiny.attach("mam", make("mam", mam("")), folder.path());
  models::LoadOptions unquantised;
  unquantised.quantization = models::Quantization::kNone;
  tiny.load(unquantised);
  const data::Batch batch = make_lane(0).batch;
  EXPECT_LT((tiny.logits(batch) - whole.tiny.logits(batch)).abs().max().item<double>(), 1e-5);
}

TEST(Compound, APartThatActsAtPointsThatAreNotForwardedIsRefused) {
  using Children = std::vector<CompoundMethod::Child>;
  const std::vector<Children> all = {
      {{"part", make("lora", "{r: 4, init_lora_weights: pissa}")}},
      {{"part", make("lora", "{r: 4, init_lora_weights: eva}")}},
      {{"part", make("fish_mask", "{}")}},
      {{"first", make("lora", "{}")}, {"part", make("l2_sp", "{}")}}};
  for (const Children& children : all) {
    Tiny tiny("llama");
    tiny.attach("compound", std::make_shared<CompoundMethod>(children));
    models::io::expect_refused([&] { tiny.load(); },
                               "peft: part: first values from matrices or data", ExitCode::kUsage);
  }
}

}  // namespace
}  // namespace graft::peft
