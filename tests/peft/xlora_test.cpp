// X-LoRA beside the contract: against HF PEFT, whose files tests/oracle/xlora.py completes; the
// look of the base that it reads; what its adapters may be.
#include <gtest/gtest.h>

#include <cstdlib>

#include "peft/adapter_file.h"
#include "tests/peft/all_methods.h"

namespace graft::peft {
namespace {

using models::io::expect_refused;
using models::io::SafetensorsFile;

models::LoadOptions dense() {
  models::LoadOptions options;
  options.quantization = models::Quantization::kNone;
  return options;
}

double difference(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(a.sizes(), b.sizes());
  return (a - b).abs().max().item<double>();
}

std::string oracle_root() {
  const char* root = std::getenv("GRAFT_ORACLE_DIR");
  return root == nullptr ? "" : root;
}

/// A copy of a case whose LoRAs are where they are.
class XLoraOracle : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (oracle_root().empty()) GTEST_SKIP() << "GRAFT_ORACLE_DIR is not set";
    const std::string from = oracle_root() + "/xlora/";
    auto config = nlohmann::json::parse(std::ifstream(from + GetParam() + "/adapter_config.json"));
    for (auto& directory : config["adapters"]) directory = from + directory.get<std::string>();
    std::ofstream(folder_.path() + "/adapter_config.json") << config.dump();
    std::filesystem::copy(from + GetParam() + "/adapter_model.safetensors", folder_.path());
    oracle_ = std::make_unique<SafetensorsFile>(from + GetParam() + "/oracle.safetensors");
    tiny_ = std::make_unique<Tiny>(models::read_base_config(oracle_root() + "/qwen2/model"));
  }
  static data::Batch batch() {
    const SafetensorsFile rows(oracle_root() + "/qwen2/oracle.safetensors");
    return make_batch(rows.read("input_ids"), rows.read("labels"));
  }
  void expect_logits() {
    const Tensor expected = oracle_->read("logits");
    EXPECT_LT(difference(tiny_->logits(batch()), expected),
              1e-5 * expected.abs().max().item<double>());
  }
  TestFolder folder_;
  std::unique_ptr<SafetensorsFile> oracle_;
  std::unique_ptr<Tiny> tiny_;
};

TEST_P(XLoraOracle, TrainedFromItsFilesHasPeftsLossLogitsAndGradients) {
  tiny_->attach("", nullptr, folder_.path());
  tiny_->load(dense());
  expect_logits();
  tiny_->training = false;
  const auto [loss, gradients] = tiny_->sweep({{batch(), 0}}, 1);
  EXPECT_NEAR(loss, oracle_->read("loss").item<double>(), 1e-5 * loss);
  size_t expected = 0;
  for (const auto& entry : oracle_->entries()) expected += entry.name.starts_with("grad.") ? 1 : 0;
  ASSERT_EQ(gradients.size(), expected);
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Tensor theirs = oracle_->read("grad." + tiny_->params()[i].hf_key);
    const double size = theirs.abs().max().item<double>();
    EXPECT_GT(size, 0);
    EXPECT_LT(difference(gradients[i], theirs), 1e-4 * size) << tiny_->params()[i].hf_key;
  }
}

TEST_P(XLoraOracle, FrozenUnderTheRunItHasPeftsLogits) {
  tiny_->adapters.attach_frozen(folder_.path());
  tiny_->load(dense());
  expect_logits();
}

TEST_P(XLoraOracle, WhatItIsSavedAsIsPeftsFile) {
  tiny_->attach("", nullptr, folder_.path());
  tiny_->load(dense());
  const Peft::Saved ours = tiny_->adapters.save(0, {"base", "CAUSAL_LM", "print"});
  const SafetensorsFile theirs(folder_.path() + "/adapter_model.safetensors");
  EXPECT_EQ(ours.tensors.size(), theirs.entries().size());
  for (const auto& [key, value] : ours.tensors)
    EXPECT_TRUE(at::equal(value, theirs.read(key))) << key;
  const auto config = nlohmann::json::parse(std::ifstream(folder_.path() + "/adapter_config.json"));
  for (const auto& [entry, value] : config.items()) {
    if (entry != "base_model_name_or_path" && entry != "peft_version" && entry != "auto_mapping") {
      EXPECT_EQ(ours.config.at(entry), value) << entry;
    }
  }
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(XLoraOracle);
INSTANTIATE_TEST_SUITE_P(Cases, XLoraOracle,
                         testing::Values("plain", "mlp", "mlp_of_three", "layerwise",
                                         "layerwise_mlp", "top_k", "top_k_mlp", "softmax_of_top_k"),
                         [](const auto& info) { return std::string(info.param); });

TEST(XLoraOracleFile, ThatPeftWroteItselfIsRefusedWithTheReason) {
  if (oracle_root().empty()) GTEST_SKIP() << "GRAFT_ORACLE_DIR is not set";
  Tiny tiny{models::read_base_config(oracle_root() + "/qwen2/model")};
  expect_refused([&] { tiny.adapters.attach_frozen(oracle_root() + "/xlora/lost"); },
                 "layers.0.weight; PEFT 0.21.2 does not write the layers");
}

std::shared_ptr<Method> xlora(const std::string& adapters = tiny_loras(),
                              const std::string& more = "xlora_depth: 2, xlora_size: 8") {
  std::shared_ptr<Method> method = methods().make("xlora");
  read_fields(*method, "{adapters: " + adapters + ", " + more + "}");
  return method;
}

std::unique_ptr<Tiny> trained() {
  auto tiny = std::make_unique<Tiny>("llama");
  tiny->attach("xlora", xlora());
  tiny->load(dense());
  tiny->jitter();
  return tiny;
}

TEST(XLora, CachedKeysGiveTheLogitsOfTheWholeRow) {
  const auto tiny = trained();
  const Tensor tokens = make_lane(0).batch.tokens_BL.slice(0, 0, 1);
  const Tensor expected = tiny->logits(make_batch(tokens, tokens));
  models::KvCache cache;
  models::Pass pass;
  pass.want = models::Want::kLastLogits;
  pass.cache = &cache;
  for (int64_t begin = 0, end = 7; begin < 12; begin = end, ++end) {
    const Tensor part = tokens.slice(1, begin, end);
    models::Lane lane{make_batch(part, part), 0};
    lane.batch.positions_BL += begin;
    const Tensor last = tiny->trunk->forward({&lane, 1}, pass).front();
    EXPECT_LT(difference(last[0][0], expected[0][end - 1]), 1e-4) << "at " << end - 1;
  }
}

TEST(XLora, RecomputedStagesGiveTheSameGradients) {
  const auto tiny = trained();
  const auto comm = dist::make_single_comm();
  std::vector<std::vector<Tensor>> gradients;
  for (const auto recompute : {models::Recompute::kOff, models::Recompute::kOn}) {
    launcher::Gradients sink(tiny->adapters.params(), tiny->model->num_stages(), 2,
                             launcher::Reduction::kTree);
    models::TrunkOptions options;
    options.recompute = recompute;
    options.random = {7, 1};
    std::vector<models::Lane> lanes = {make_lane(0), make_lane(1)};
    tiny->trunk->sweep(lanes, sink, options);
    sink.reduce(*comm, 1);
    gradients.push_back(sink.of());
    for (Tensor& g : gradients.back()) g = g.clone();
  }
  for (size_t i = 0; i < gradients[0].size(); ++i) {
    EXPECT_GT(gradients[0][i].abs().max().item<double>(), 0);
    EXPECT_TRUE(at::equal(gradients[0][i], gradients[1][i])) << tiny->params()[i].name;
  }
}

TEST(XLora, ItsLorasAreFrozenAndHashedAndNoSlotRunsThemAlone) {
  const auto tiny = trained();
  const std::string before = tiny->adapters.frozen_hash();
  EXPECT_FALSE(before.empty());
  for (int i = 0; i < 2; ++i) tiny->step({make_lane(0), make_lane(1)}, 2);
  EXPECT_EQ(tiny->adapters.frozen_hash(), before);
  for (const Param& param : tiny->params()) EXPECT_NE(param.name.find("router"), std::string::npos);
  const auto& slot = *tiny->adapters.slots().find_linear("block.1.mlp.down")->slot;
  EXPECT_EQ(slot.size(), 1U) << "what mixes them";
  EXPECT_EQ(slot.frozen().size(), 2U);
}

TEST(XLora, OverAnotherAdapterItTrainsBoth) {
  Tiny tiny("llama");
  std::shared_ptr<Method> lora = methods().make("lora");
  read_fields(*lora, "{target_modules: all-linear, r: 2}");
  tiny.attach("lora", lora);
  tiny.attach("xlora", xlora());
  tiny.load(dense());
  tiny.jitter();
  const auto gradients = tiny.sweep({make_lane(0), make_lane(1)}, 2).gradients;
  for (size_t i = 0; i < gradients.size(); ++i)
    EXPECT_GT(gradients[i].abs().max().item<double>(), 0) << tiny.params()[i].name;
}

TEST(XLora, WhatItCannotMixIsRefused) {
  const auto attach = [](const std::shared_ptr<Method>& method) {
    Tiny tiny("llama");
    tiny.attach("xlora", method);
    tiny.load();
  };
  expect_refused([&] { attach(xlora("[]")); }, "adapters = []", ExitCode::kUsage);
  expect_refused([&] { attach(xlora(tiny_loras(), "top_k_lora: 3")); }, "top_k_lora = 3 of 2",
                 ExitCode::kUsage);
  struct Other {
    const char *method, *options, *words;
    ExitCode code = ExitCode::kUsage;
  };
  const std::vector<Other> others = {
      {"lora", "{lora_bias: true}", "at block.0.attn.q it is no LoRA"},
      {"lora", "{target_modules: embed}", "at embed it is no LoRA"},
      {"lora", "{target_modules: head}", "at head it is no LoRA"},
      {"lora", "{modules_to_save: head}", "at head it is no LoRA"},
      {"freeze_layers", "{}", "a tensor of the base itself", ExitCode::kData},
  };
  for (const Other& other : others) {
    SCOPED_TRACE(other.options);
    const TestFolder folder;
    Tiny tiny("llama");
    std::shared_ptr<Method> method = methods().make(other.method);
    read_fields(*method, other.options);
    tiny.attach(other.method, method);
    tiny.load();
    tiny.save(folder.path());
    expect_refused([&] { attach(xlora("[" + folder.path() + "]")); }, other.words, other.code);
  }
}

TEST(XLora, BesideASoftPromptIsRefused) {
  Tiny tiny("llama");
  std::shared_ptr<Method> prompt = methods().make("prompt_tuning");
  read_fields(*prompt, "{num_virtual_tokens: 3}");
  tiny.attach("prompt_tuning", prompt);
  tiny.attach("xlora", xlora());
  tiny.load();
  expect_refused([&] { tiny.sweep({make_lane(0)}, 1); }, "beside a soft prompt", ExitCode::kUsage);
}

}  // namespace
}  // namespace graft::peft
