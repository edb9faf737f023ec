// Adapter directories: what does not fit is refused with names and leaves every value as it was.
#include <gtest/gtest.h>

#include <limits>

#include "tests/peft/tiny.h"

namespace graft::peft {
namespace {

using models::io::expect_refused;

constexpr const char* kFirstA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

class Directories : public testing::Test {
 protected:
  void SetUp() override {
    tiny.attach("lora", methods().make("lora"));
    tiny.load();
    tiny.jitter();
    saved = tiny.adapters.save(0, {"base", "CAUSAL_LM", "print"});
    for (auto& [name, value] : saved.tensors) value = value.clone();  // tests damage them
    hash = tiny.adapters.params().hash();
  }
  /// Loads `saved`, which a test has damaged.
  void expect_load_refused(const std::string& words) {
    Tiny::write_adapter(folder.path(), saved.config, saved.tensors);
    expect_refused([&] { tiny.adapters.load(folder.path()); }, words);
    EXPECT_EQ(tiny.adapters.params().hash(), hash) << "half loaded";
  }
  /// Starts from the directory, whose config a test has changed.
  void expect_start_refused(const std::string& words) {
    Tiny::write_adapter(folder.path(), saved.config, saved.tensors);
    Tiny other("llama");
    expect_refused([&] { other.adapters.attach_frozen(folder.path()); }, words);
  }
  Tensor& tensor(const std::string& key) {
    for (auto& [name, value] : saved.tensors) {
      if (name == key) return value;
    }
    throw Error(ExitCode::kBug, key);
  }

  TestFolder folder;
  Tiny tiny{"llama"};
  Peft::Saved saved;
  std::string hash;
};

TEST_F(Directories, AMissingConfigIsNamed) {
  expect_refused([&] { tiny.adapters.attach_frozen(folder.path()); }, "no adapter_config.json");
}

TEST_F(Directories, MissingWeightsAreNamed) {
  expect_refused([&] { tiny.adapters.load(folder.path()); }, "adapter_model.safetensors");
}

TEST_F(Directories, AMissingTensorIsNamed) {
  std::erase_if(saved.tensors, [](const auto& t) { return t.first == kFirstA; });
  expect_load_refused(std::string("missing: ") + kFirstA);
}

TEST_F(Directories, AnUnknownTensorIsNamed) {
  saved.tensors.emplace_back("base_model.model.lm_head.weight", at::ones({2, 2}));
  expect_load_refused("unknown: base_model.model.lm_head.weight");
}

TEST_F(Directories, AWrongShapeIsNamedWithBoth) {
  tensor(kFirstA) = at::zeros({4, 48});
  expect_load_refused(std::string("shape: ") + kFirstA + " is [4, 48], expected [8, 48]");
}

TEST_F(Directories, ANumberThatIsNotFiniteIsRefused) {
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    tensor(kFirstA)[0][0] = bad;
    expect_load_refused(std::string("not finite: ") + kFirstA);
  }
}

TEST_F(Directories, EveryProblemIsListedAtOnce) {
  tensor(kFirstA)[0][0] = std::numeric_limits<double>::quiet_NaN();
  saved.tensors.emplace_back("stranger", at::ones({1}));
  Tiny::write_adapter(folder.path(), saved.config, saved.tensors);
  expect_refused([&] { tiny.adapters.load(folder.path()); }, "not finite");
  expect_refused([&] { tiny.adapters.load(folder.path()); }, "unknown: stranger");
}

TEST_F(Directories, HalfPrecisionBecomesFloat) {
  for (auto& [name, value] : saved.tensors) value = value.to(at::kBFloat16);
  Tiny::write_adapter(folder.path(), saved.config, saved.tensors);
  tiny.adapters.load(folder.path());
  for (size_t i = 0; i < saved.tensors.size(); ++i) {
    EXPECT_TRUE(at::equal(tiny.params()[i].value, saved.tensors[i].second.to(at::kFloat)));
  }
}

TEST_F(Directories, AnUnknownTypeIsNamed) {
  saved.config["peft_type"] = "NO_SUCH";
  expect_start_refused("peft_type 'NO_SUCH' is not supported; known: ");
  saved.config.erase("peft_type");
  expect_start_refused("peft_type '' is not supported");
}

TEST_F(Directories, AnEntryThatChangesTheMathematicsIsNamed) {
  saved.config["use_qalora"] = true;
  expect_start_refused("use_qalora = true");
  saved.config["use_qalora"] = false;
  saved.config["an_entry_of_tomorrow"] = 3;
  expect_start_refused("an_entry_of_tomorrow = 3");
}

// PEFT takes these apart again when it loads: the base under such an adapter is not the one in the
// files.
TEST_F(Directories, AnInitialisationThatChangesTheBaseIsRefused) {
  for (const char* init : {"pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"}) {
    saved.config["init_lora_weights"] = init;
    expect_start_refused(std::string("init_lora_weights = \"") + init + "\"");
  }
  saved.config["init_lora_weights"] = "gaussian";
  Tiny::write_adapter(folder.path(), saved.config, saved.tensors);
  EXPECT_NO_THROW(Tiny("llama").adapters.attach_frozen(folder.path()));
}

TEST_F(Directories, ValuesOutOfRangeAreRefused) {
  const nlohmann::json good = saved.config;
  const std::vector<std::pair<const char*, nlohmann::json>> bad = {
      {"r", -4},         {"r", 0},
      {"lora_alpha", 0}, {"lora_dropout", 1.5},
      {"bias", "some"},  {"rank_pattern", {{"q_proj", 0}}}};
  for (const auto& [key, value] : bad) {
    saved.config = good;
    saved.config[key] = value;
    expect_start_refused("adapter_config.json: " + std::string(key));
  }
}

TEST_F(Directories, AValueOfTheWrongTypeIsRefused) {
  const nlohmann::json good = saved.config;
  const std::vector<std::pair<const char*, nlohmann::json>> bad = {
      {"r", "eight"},        {"r", 4.7},           {"r", true},
      {"r", 4294967304},     {"lora_alpha", true}, {"lora_alpha", "8"},
      {"use_rslora", 1},     {"bias", 3},          {"rank_pattern", {{"q_proj", 8.5}}},
      {"alpha_pattern", {8}}};
  for (const auto& [key, value] : bad) {
    saved.config = good;
    saved.config[key] = value;
    expect_start_refused("adapter_config.json: " + std::string(key));
  }
}

TEST_F(Directories, ANumberNoAdapterHasIsRefusedOrComputedWith) {
  saved.config["lora_alpha"] = 1e308;
  expect_start_refused("lora_alpha: expected a number greater than 0");
  saved.config["lora_alpha"] = 1e-310;
  Tiny::write_adapter(folder.path(), saved.config, saved.tensors);
  Tiny faint("llama");
  faint.adapters.attach_frozen(folder.path());
  faint.load();
  const data::Batch batch = make_lane(0).batch;
  EXPECT_TRUE(at::equal(faint.logits(batch), faint.logits(batch, false)));
}

TEST_F(Directories, ADtypeThatIsNoFloatIsNamed) {
  const Tensor good = tensor(kFirstA);
  for (const auto type : {at::kChar, at::kBool, at::kLong, at::kComplexFloat, at::kFloat8_e4m3fn,
                          at::kFloat8_e8m0fnu, at::kUInt16, at::kUInt64}) {
    tensor(kFirstA) = at::empty(good.sizes(), type);
    expect_load_refused(std::string("dtype: ") + kFirstA + " is ");
  }
}

TEST_F(Directories, ACopyOfTheBaseIsTakenOnlyWhereItIsTheBases) {
  const std::string key = "base_model.model.lm_head.base_layer.weight";
  const auto start_with = [&](const std::string& name, const Tensor& copy) {
    auto tensors = saved.tensors;
    tensors.emplace_back(name, copy);
    Tiny::write_adapter(folder.path(), saved.config, tensors);
    Tiny other("llama");
    other.adapters.attach_frozen(folder.path());
    other.load();
  };
  const Tensor base = fill("lm_head.weight", {128, 48}, 0.25);
  EXPECT_NO_THROW(start_with(key, base));
  EXPECT_NO_THROW(start_with(key, base.to(at::kBFloat16)));
  expect_refused([&] { start_with(key, base + 1e-3); }, key);
  expect_refused([&] { start_with(key, base.to(at::kInt)); }, key);
  const std::string inner = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight";
  expect_refused([&] { start_with(inner, fill("x", {48, 48}, 1)); }, inner);
}

TEST_F(Directories, TheModulesAreThoseOfTheFile) {
  saved.config["target_modules"] = R"(.*\.(q|v)_proj)";
  saved.config["layers_to_transform"] = {0};
  saved.config["rank_pattern"] = {{"k_proj", 3}, {"nowhere", 0}};
  Tiny::write_adapter(folder.path(), saved.config, saved.tensors);
  Tiny other("llama");
  other.attach("", nullptr, folder.path());
  other.load();
  EXPECT_EQ(other.params().size(), tiny.params().size());
  for (size_t i = 0; i < other.params().size(); ++i)
    EXPECT_TRUE(at::equal(other.params()[i].value, tiny.params()[i].value));
}

TEST_F(Directories, AModuleTheModelHasNotIsADataError) {
  saved.tensors.emplace_back("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight",
                             at::ones({8, 48}));
  expect_start_refused("unknown: base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight");
  saved.tensors.back().first = "base_model.model.lm_head.scale.weight";
  expect_start_refused("lm_head.scale");
}

TEST_F(Directories, AnAdapterOfNothingIsRefused) {
  saved.tensors.clear();
  expect_start_refused("the adapter holds nothing");
}

TEST_F(Directories, TheRevisionOfTheBaseIsWritten) {
  const auto revision = [&](const BaseFacts& facts) {
    return tiny.adapters.save(0, facts).config["revision"];
  };
  EXPECT_EQ(revision({"base", "CAUSAL_LM", "print", "v2"}), "v2");
  EXPECT_EQ(revision({"base", "CAUSAL_LM", "print"}), nullptr);
}

// PEFT warns of entries of adapter_config.json that it does not know.
TEST_F(Directories, WhatOnlyGraftKnowsIsInTheMetadataOfTheTensors) {
  EXPECT_FALSE(saved.config.contains("graft"));
  EXPECT_EQ(saved.metadata.at("format"), "pt");
  EXPECT_EQ(nlohmann::json::parse(saved.metadata.at("graft")),
            (nlohmann::json{{"method", "lora"},
                            {"base_fingerprint", "print"},
                            {"calibration_samples", 64},
                            {"loraplus_lr_ratio", 1.0},
                            {"loraplus_lr_embedding", 1e-6},
                            {"lora_fa", false},
                            {"lora_fa_gradient", "projected"}}));
}

TEST(Lora, OptionsThatPeftHasNotComeBackFromTheFile) {
  const TestFolder folder;
  Tiny first("llama"), second("llama");
  std::shared_ptr<Method> lora = methods().make("lora");
  read_fields(*lora, "{loraplus_lr_ratio: 16, lora_fa: true}");
  first.attach("lora", lora);
  first.load();
  first.save(folder.path());
  const Peft::Saved written = first.adapters.save(0, {"base", "CAUSAL_LM", "print"});
  models::io::write_safetensors(folder.path() + "/adapter_model.safetensors", written.tensors,
                                written.metadata);
  second.attach("", nullptr, folder.path());
  second.load();
  ASSERT_EQ(second.params().size(), first.params().size());
  for (const Param& p : second.params()) {
    EXPECT_TRUE(p.name.ends_with("lora_b")) << p.name;
    EXPECT_EQ(p.learning_rate_factor, 16);
  }
  const auto& constants = second.adapters.params().constants();
  ASSERT_EQ(constants.size(), second.params().size());
  EXPECT_TRUE(at::equal(constants[0].value, first.adapters.params().constants()[0].value));
}

TEST(Methods, MoreThanSixtyFourAreRefused) {
  Tiny tiny("llama");
  for (int i = 0; i < 65; ++i) tiny.attach("lora", methods().make("lora"));
  expect_refused([&] { tiny.load(); }, "65 methods, at most 64", ExitCode::kUsage);
}

TEST_F(Directories, TwoMethodsAreLoadedBothOrNeither) {
  Tiny two("llama");
  two.attach("lora", methods().make("lora"));
  two.attach("lora", methods().make("lora"));
  two.load();
  const std::string before = two.adapters.params().hash();
  Tiny::write_adapter(folder.path() + "/0", saved.config, saved.tensors);
  expect_refused([&] { two.adapters.load(folder.path()); }, "/1/adapter_model.safetensors");
  EXPECT_EQ(two.adapters.params().hash(), before) << "half loaded";
  Tiny::write_adapter(folder.path() + "/1", saved.config, saved.tensors);
  two.adapters.load(folder.path());
  EXPECT_NE(two.adapters.params().hash(), before);
}

TEST_F(Directories, AFrozenAdapterUnderATrainedOneStaysAsItWas) {
  tiny.save(folder.path());
  Tiny stack("llama");
  stack.adapters.attach_frozen(folder.path());
  stack.attach("lora", methods().make("lora"));
  stack.load();
  const data::Batch batch = make_lane(0).batch;
  EXPECT_TRUE(at::equal(stack.logits(batch), tiny.logits(batch)));  // the upper one starts at zero
  for (int i = 0; i < 3; ++i) stack.step({make_lane(0)}, 1);
  for (const Param& p : stack.params()) {
    const at::NoGradGuard no_grad;
    Tensor(p.value).zero_();
  }
  EXPECT_TRUE(at::equal(stack.logits(batch), tiny.logits(batch)));
}

}  // namespace
}  // namespace graft::peft
