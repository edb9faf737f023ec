// Several adapters on one base: frozen ones run as one product and give what nesting gives, have
// weights and names, stay as they are, and drop nothing; what cannot stand on what is refused.
#include <gtest/gtest.h>

#include "peft/low_rank_stack.h"
#include "tests/peft/one_slot.h"

namespace graft::peft {
namespace {

using models::io::expect_refused;

std::shared_ptr<Method> make(const std::string& name, const std::string& options) {
  std::shared_ptr<Method> method = methods().make(name);
  read_fields(*method, options);
  return method;
}

const std::string kLora = "target_modules: all-linear";

class AdapterStack : public ::testing::Test {
 protected:
  /// A directory with an adapter whose values are functions of `name`.
  std::string saved(const std::string& name, const std::string& method,
                    const std::string& options) const {
    Tiny tiny("llama");
    tiny.attach(method, make(method, options));
    tiny.load();
    const at::NoGradGuard no_grad;
    for (const Param& p : tiny.params())
      Tensor(p.value).copy_(fill(name + p.name, p.value.sizes(), 0.2));
    const std::string directory = folder_.path() + "/" + name;
    const Peft::Saved files = tiny.adapters.save(0, {"base", "CAUSAL_LM", "print"});
    Tiny::write_adapter(directory, files.config, files.tensors);
    models::io::write_safetensors(directory + "/adapter_model.safetensors", files.tensors,
                                  files.metadata);  // which name a method that PEFT has not
    return directory;
  }
  /// The logits with one adapter after the other trained ones' way: nested, none of them fused.
  Tensor nested(const std::vector<std::string>& directories) const {
    Tiny tiny("llama");
    for (const std::string& directory : directories) tiny.attach("", nullptr, directory);
    tiny.load();
    return tiny.logits(batch_).detach();
  }
  const LinearSite& site(const Tiny& tiny) const {
    return *tiny.adapters.slots().find_linear("block.0.attn.q");
  }
  static double difference(const Tensor& a, const Tensor& b) {
    return (a - b).abs().max().item<double>() / b.abs().max().item<double>();
  }

  models::io::TestFolder folder_;
  data::Batch batch_ = make_lane(0).batch;
  std::string a_ = saved("a", "lora", kLora + "\nr: 4"), b_ = saved("b", "lora", kLora + "\nr: 2"),
              c_ = saved("c", "lora_xs", "{target_modules: [attn.q, mlp.down], r: 3}");
};

TEST_F(AdapterStack, RunsAsOneProductAndGivesWhatNestingGives) {
  Tiny tiny("llama");
  for (const std::string& directory : {a_, b_, c_}) tiny.adapters.attach_frozen(directory);
  tiny.load();
  const auto& running = site(tiny).slot->adapters();
  ASSERT_EQ(running.size(), 1U);
  EXPECT_NE(dynamic_cast<const LowRankStack*>(running[0].get()), nullptr);
  EXPECT_LT(difference(tiny.logits(batch_), nested({a_, b_, c_})), 1e-5);
  EXPECT_GT(difference(tiny.logits(batch_), nested({a_, b_})), 1e-3);
}

TEST_F(AdapterStack, TrainedOnItAnAdapterGetsTheGradientsOfNesting) {
  const auto method = [] { return make("lora", kLora + "\nr: 4"); };
  Tiny stack("llama"), nest("llama");
  stack.adapters.attach_frozen(a_), stack.adapters.attach_frozen(b_);
  stack.attach("lora", method());
  nest.attach("", nullptr, a_), nest.attach("", nullptr, b_), nest.attach("lora", method());
  stack.load(), nest.load();
  const size_t below = nest.params().size() - stack.params().size();
  for (size_t i = 0; i < stack.params().size(); ++i) {  // of the same values in both
    const at::NoGradGuard no_grad;
    const Tensor value = fill(stack.params()[i].hf_key, stack.params()[i].value.sizes(), 0.2);
    Tensor(stack.params()[i].value).copy_(value);
    Tensor(nest.params()[below + i].value).copy_(value);
  }
  EXPECT_EQ(site(stack).slot->size(), 2U);
  const auto ours = stack.sweep({make_lane(0)}, 1), expected = nest.sweep({make_lane(0)}, 1);
  EXPECT_NEAR(ours.loss, expected.loss, 1e-5 * expected.loss);
  for (size_t i = 0; i < ours.gradients.size(); ++i)
    EXPECT_LT(difference(ours.gradients[i], expected.gradients[below + i]), 1e-4) << i;
}

TEST_F(AdapterStack, MergedIsTheMatrixItComputesWith) {
  Tiny tiny("llama");
  tiny.adapters.attach_frozen(a_, 0.5), tiny.adapters.attach_frozen(b_, -2);
  tiny.load();
  models::LinearAdapter& stack = *site(tiny).slot->adapters().at(0);
  const Tensor w = fill("w", {site(tiny).info.out, site(tiny).info.in}, 0.25);
  const Tensor x = fill("x", {5, site(tiny).info.in}, 1);
  const Tensor y = stack.forward(x, Dense(w, Tensor()), models::Pass());
  EXPECT_LT(difference(y, at::linear(x, stack.merged(w))), 1e-5);
  const Tensor in_half = stack.forward(x.to(at::kBFloat16), Dense(w.to(at::kBFloat16), Tensor()),
                                       models::Pass());  // the same adapter in another dtype
  EXPECT_LT(difference(in_half.to(at::kFloat), y), 0.05);
}

TEST_F(AdapterStack, HasNamesThatSwitchAndWeights) {
  Tiny tiny("llama");
  tiny.adapters.attach_frozen(a_, 1, "one"), tiny.adapters.attach_frozen(b_, 1, "two");
  tiny.load();
  tiny.adapters.activate({"two"});
  EXPECT_TRUE(at::equal(tiny.logits(batch_), nested({b_})));
  tiny.adapters.activate({"two", "one"});
  EXPECT_LT(difference(tiny.logits(batch_), nested({a_, b_})), 1e-5);
  tiny.adapters.activate({});
  EXPECT_TRUE(at::equal(tiny.logits(batch_), tiny.logits(batch_, false)));
  expect_refused([&] { tiny.adapters.activate({"three"}); },
                 "no adapter is called 'three'; there are: one, two", ExitCode::kUsage);

  Tiny none("llama");
  none.adapters.attach_frozen(a_, 0);
  none.load();
  EXPECT_EQ(difference(none.logits(batch_), none.logits(batch_, false)), 0);
}

TEST_F(AdapterStack, AWeightOfWhatIsNoProductIsRefused) {
  const std::string ia3 = saved("ia3", "ia3", "target_modules: [attn.k, mlp.down]");
  expect_refused([&] { Tiny("llama").adapters.attach_frozen(ia3, 0.5); }, "a weight of 0.5",
                 ExitCode::kUsage);
}

TEST_F(AdapterStack, DropsNothingAndStaysAsItIs) {
  const std::string dropping = saved("d", "lora", kLora + "\nlora_dropout: 0.5");
  const std::string hira = saved("h", "hira", "{target_modules: [attn.q], hira_dropout: 0.5}");
  Tiny tiny("llama");
  for (const std::string& directory : {dropping, hira, a_}) tiny.adapters.attach_frozen(directory);
  tiny.attach("lora", make("lora", kLora));
  tiny.load();
  const std::string before = tiny.adapters.frozen_hash();
  const double trained = tiny.sweep({make_lane(0)}, 1).loss;
  tiny.training = false;
  EXPECT_EQ(trained, tiny.sweep({make_lane(0)}, 1).loss);
  for (int i = 0; i < 3; ++i) tiny.step({make_lane(0)}, 1);
  EXPECT_EQ(tiny.adapters.frozen_hash(), before);
  EXPECT_LT(tiny.sweep({make_lane(0)}, 1).loss, trained);

  models::LinearAdapter& frozen = *site(tiny).slot->frozen().front().adapter;
  const at::NoGradGuard no_grad;
  frozen.parameters().front().add_(1);
  EXPECT_NE(tiny.adapters.frozen_hash(), before);
}

TEST_F(AdapterStack, AMethodThatNeedsTheMatrixIsRefusedOnOneThatHasNone) {
  const std::string with_bias =
      saved("bias", "lora", "{target_modules: [attn.q], lora_bias: true}");
  for (const char* outer : {"dora", "hira"}) {
    Tiny tiny("llama");
    std::vector<MethodEntry> entries;
    entries.push_back({"lora", make("lora", "{target_modules: [attn.q], lora_bias: true}"), {}});
    entries.push_back({outer, make(outer, "target_modules: [attn.q, attn.v]"), {}});
    expect_refused([&] { tiny.adapters.attach(entries); },
                   std::string(outer) + " needs the matrix of block.0.attn.q, and lora below it",
                   ExitCode::kUsage);
    Tiny frozen("llama");
    frozen.adapters.attach_frozen(a_), frozen.adapters.attach_frozen(with_bias);
    entries.erase(entries.begin());
    expect_refused([&] { frozen.adapters.attach(entries); }, "lora (" + with_bias + ") below it",
                   ExitCode::kUsage);
  }
  Tiny other("llama");  // on other modules, and above, they compose
  std::vector<MethodEntry> entries;
  entries.push_back({"dora", make("dora", "target_modules: [attn.q]"), {}});
  entries.push_back({"lora", make("lora", "{target_modules: [attn.q], lora_bias: true}"), {}});
  entries.push_back({"hira", make("hira", "target_modules: [attn.v]"), {}});
  EXPECT_NO_THROW(other.adapters.attach(entries));
}

struct Dead {
  std::string below, below_fields, above, above_fields, slot;
};

TEST_F(AdapterStack, WhatWouldDoNothingBelowAnotherIsRefusedWithBothNames) {
  const std::string tokens = "{token_indices: [11, 48]}";
  const std::vector<Dead> table = {
      {"lora", "target_modules: attn.q", "lora",
       "{target_modules: attn.v, modules_to_save: attn.q}", "block.0.attn.q"},
      {"lora", "target_modules: head", "linear_probe", "{}", "head"},
      {"layernorm_tuning", "{}", "layernorm_tuning", "{}", "block.0.attn_norm"},
      {"trainable_tokens", tokens, "trainable_tokens", tokens, "embed"},
  };
  for (const Dead& row : table) {
    SCOPED_TRACE(row.above + " over " + row.below);
    const auto said = [&](const std::string& above, const std::string& below) {
      return "peft: " + above + " takes the place of " + row.slot + ", and " + below +
             " below it would do nothing there";
    };
    Tiny trained("llama");
    trained.attach(row.below, make(row.below, row.below_fields));
    trained.attach(row.above, make(row.above, row.above_fields));
    expect_refused([&] { trained.load(); }, said(row.above, row.below), ExitCode::kUsage);

    const std::string below = saved("below", row.below, row.below_fields);
    const std::string above = saved("above", row.above, row.above_fields);
    Tiny over_frozen("llama");
    over_frozen.adapters.attach_frozen(below);
    over_frozen.attach(row.above, make(row.above, row.above_fields));
    expect_refused([&] { over_frozen.load(); }, said(row.above, row.below + " (" + below + ")"),
                   ExitCode::kUsage);

    Tiny frozen("llama");
    frozen.adapters.attach_frozen(below), frozen.adapters.attach_frozen(above);
    expect_refused([&] { frozen.load(); },
                   said(row.above + " (" + above + ")", row.below + " (" + below + ")"),
                   ExitCode::kUsage);
    Tiny one("llama");  // never both at once
    one.adapters.attach_frozen(below, 1, "b"), one.adapters.attach_frozen(above, 1, "a");
    one.adapters.activate({"a"});
    EXPECT_NO_THROW(one.load());
  }
}

TEST_F(AdapterStack, WhatStandsOnAWholeMatrixComposes) {
  Tiny tiny("llama");
  tiny.attach("lora", make("lora", "{target_modules: attn.v, modules_to_save: attn.q}"));
  tiny.attach("lora", make("lora", "target_modules: attn.q"));
  tiny.load();
  for (const Tensor& gradient : tiny.sweep({make_lane(0)}, 1).gradients)
    EXPECT_TRUE(gradient.defined());
}

TEST_F(AdapterStack, AnAdapterOnAClassifiersHeadIsRefused) {
  Tiny tiny("llama_tokens");
  tiny.attach("lora", make("lora", "target_modules: [attn.q, head]"));
  expect_refused([&] { tiny.load(); }, "lora takes the place of head, and lora below it",
                 ExitCode::kUsage);
}

}  // namespace
}  // namespace graft::peft
