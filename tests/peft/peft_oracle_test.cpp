// Every type of adapter against HF PEFT: directories that it wrote, and what it computes from them.
// tests/oracle/peft_methods.py and peft_prompts.py write them into GRAFT_ORACLE_DIR/peft_methods
// and say what is there. A type that no method here has is skipped by name; one that has no
// directory fails.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <set>

#include "peft/adapter_file.h"
#include "tests/peft/tiny.h"

namespace graft::peft {
namespace {

using models::io::SafetensorsFile;

constexpr double kLossTolerance = 1e-5;
constexpr double kTolerance = 1e-4;  ///< of a tensor's largest element

std::string oracle_root() {
  const char* root = std::getenv("GRAFT_ORACLE_DIR");
  return root == nullptr ? "" : root;
}

constexpr std::string_view kNf4 = "nf4_";  ///< begins the names of those over an NF4 base

std::vector<std::string> adapter_names() {
  std::vector<std::string> names;
  for (const auto& [folder, prefix] :
       {std::pair{"/peft_methods", ""}, {"/peft_methods_nf4", kNf4.data()}}) {
    const std::filesystem::path root = oracle_root() + folder;
    if (oracle_root().empty() || !std::filesystem::exists(root)) continue;
    for (const auto& entry : std::filesystem::directory_iterator(root))
      names.push_back(prefix + entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::string directory_of(const std::string& name) {
  if (name.starts_with(kNf4))
    return oracle_root() + "/peft_methods_nf4/" + name.substr(kNf4.size());
  return oracle_root() + "/peft_methods/" + name;
}

nlohmann::json config_of(const std::string& directory) {
  return nlohmann::json::parse(std::ifstream(directory + "/adapter_config.json"));
}

std::set<std::string> known_types() {
  std::set<std::string> known;
  for (const auto& entry : methods().entries()) known.insert(entry.make()->peft_type());
  return known;
}

double largest(const Tensor& t) {
  return t.numel() == 0 ? 0 : t.to(at::kDouble).abs().max().item<double>();
}

/// @param floor  the smallest size that an error is held against
void expect_equal(const Tensor& ours, const Tensor& expected, const std::string& what,
                  double floor = 0) {
  ASSERT_EQ(ours.sizes(), expected.sizes()) << what;
  const double size = std::max(largest(expected), floor);
  const double error = largest(ours.to(at::kDouble) - expected.to(at::kDouble));
  EXPECT_LE(error, kTolerance * size) << what << ", largest " << size;
}

models::LoadOptions dense() {
  models::LoadOptions options;
  options.quantization = models::Quantization::kNone;
  return options;
}

/// What a known type cannot do yet, and the words of the refusal.
const std::map<std::string, std::string> kRefusals = {
    {"lora_dora_embed", "adapts linear layers only"},
};

class PeftOracle : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (!known_types().contains(type)) GTEST_SKIP() << "no method is PEFT's " << type;
    if (kRefusals.contains(GetParam())) {
      models::io::expect_refused([&] { tiny.adapters.attach_frozen(directory); },
                                 kRefusals.at(GetParam()));
      GTEST_SKIP() << "refused: " << kRefusals.at(GetParam());
    }
  }
  data::Batch batch() const {
    const SafetensorsFile file(oracle_root() + "/qwen2/oracle.safetensors");
    return make_batch(file.read("input_ids"), file.read("labels"));
  }
  static models::LoadOptions load_options() {
    models::LoadOptions options = dense();
    if (GetParam().starts_with(kNf4)) options.quantization = models::Quantization::kNf4;
    options.double_quantization = false;
    return options;
  }
  void expect_logits() { expect_equal(tiny.logits(batch()), oracle.read("logits"), "logits"); }

  std::string directory = directory_of(GetParam());
  std::string type = config_of(directory)["peft_type"];
  SafetensorsFile oracle{directory + "/oracle.safetensors"};
  Tiny tiny{models::read_base_config(oracle_root() + base_of() + "/model")};

 private:
  std::string base_of() const {
    if (type == "ADAPTION_PROMPT") return "/llama_square";
    return GetParam().ends_with("tokens_tied") ? "/llama_tied" : "/qwen2";
  }
};

TEST_P(PeftOracle, TrainedFromItsFilesHasPeftsLossLogitsAndGradients) {
  tiny.attach("", nullptr, directory);
  tiny.load(load_options());
  expect_logits();
  tiny.training = false;  // as PEFT was
  const auto [loss, gradients] = tiny.sweep({{batch(), 0}}, 1);
  // PEFT's hooks have projected the gradients already; here that is done once a step.
  if (type == "OSF") tiny.adapters.after_reduce({});
  const double expected_loss = oracle.read("loss").item<double>();
  EXPECT_NEAR(loss, expected_loss, kLossTolerance * expected_loss);

  std::set<std::string> expected, ours;
  double size = 0;
  for (const auto& entry : oracle.entries()) {
    if (!entry.name.starts_with("grad.")) continue;
    // PEFT makes logits of its shares, some of them infinite, and refuses to train them.
    if (GetParam() == "vblora_topk" && entry.name.find("logits") != std::string::npos) continue;
    expected.insert(entry.name.substr(5));
    size = std::max(size, largest(oracle.read(entry.name)));
  }
  for (const Param& param : tiny.params()) ours.insert(param.hf_key);
  ASSERT_EQ(ours, expected) << "what is trained";
  for (size_t i = 0; i < gradients.size(); ++i) {
    const std::string& key = tiny.params()[i].hf_key;
    expect_equal(gradients[i], oracle.read("grad." + key), "gradient of " + key, 1e-3 * size);
  }
}

TEST_P(PeftOracle, TwentyStepsLaterItsParametersArePefts) {
  constexpr int64_t kSteps = 20;  // as in peft_methods.py
  constexpr double kLearningRate = 2e-3, kEpsilon = 1e-5;
  std::map<std::string, Tensor> expected;
  for (const auto& entry : oracle.entries()) {
    if (entry.name.starts_with("after.")) expected[entry.name.substr(6)] = oracle.read(entry.name);
  }
  if (expected.empty()) GTEST_SKIP() << "PEFT took no steps with it";
  tiny.attach("", nullptr, directory);
  tiny.load(dense());
  tiny.training = false;
  tiny.optimizer = std::make_unique<launcher::AdamW>(tiny.adapters.params(),
                                                     launcher::StepConfig{.epsilon = kEpsilon});
  std::map<std::string, Tensor> start;
  for (const Param& param : tiny.params()) start[param.hf_key] = param.value.detach().clone();
  for (int64_t step = 0; step < kSteps; ++step) {  // as Tiny::step, in a run of so many
    const auto gradients = tiny.sweep({{batch(), 0}}, 1).gradients;
    tiny.adapters.after_reduce({step, kSteps});
    tiny.optimizer->step(gradients, kLearningRate);
    tiny.adapters.after_step({step, kSteps});
  }
  for (const Param& param : tiny.params()) {
    const Tensor& after = expected.at(param.hf_key);
    expect_equal(param.value.detach(), after, param.hf_key);
    EXPECT_GT(largest(after - start.at(param.hf_key)), kLearningRate / 2) << param.hf_key;
  }
}

TEST_P(PeftOracle, FrozenUnderTheRunItHasPeftsLogits) {
  tiny.adapters.attach_frozen(directory);
  tiny.load(load_options());
  EXPECT_TRUE(tiny.params().empty());
  expect_logits();
}

TEST_P(PeftOracle, ItsFieldsAloneStartWherePeftDoes) {
  std::string name;
  tiny.attach("", method_of_directory(directory, name));
  tiny.load(load_options());
  const auto compare = [&](const std::string& key, const Tensor& value) {
    if (oracle.find("start." + key) != nullptr)
      expect_equal(value, oracle.read("start." + key), key, 1e-2);
  };
  for (const Param& param : tiny.params()) compare(param.hf_key, param.value.detach());
  for (const Constant& constant : tiny.adapters.params().constants())
    compare(constant.hf_key, constant.value);
}

/// PEFT writes RandLoRA's shared matrices once more for every slot.
bool is_repeated(const std::string& key) {
  return key.starts_with(kFilePrefix) &&
         (key.ends_with(".randlora_A") || key.ends_with(".randlora_B"));
}

/// Entries that say where an adapter comes from, and those compared by what they mean.
bool is_compared(const std::string& entry) {
  static const std::set<std::string> kOthers = {
      "base_model_name_or_path", "peft_version",    "revision",      "auto_mapping",
      "target_modules",          "inference_mode",  "rank_pattern",  "alpha_pattern",
      "exclude_modules",         "modules_to_save", "layers_pattern"};
  return !kOthers.contains(entry) && !entry.ends_with("_pattern");
}

TEST_P(PeftOracle, WhatItIsSavedAsIsPeftsOwnFile) {
  tiny.attach("", nullptr, directory);
  tiny.load(load_options());
  const Peft::Saved ours = tiny.adapters.save(0, {"base", "CAUSAL_LM", "print"});
  const SafetensorsFile theirs(directory + "/adapter_model.safetensors");
  std::set<std::string> our_keys, their_keys;
  for (const auto& entry : theirs.entries()) {
    if (!entry.name.ends_with(kBaseCopy) && !is_repeated(entry.name)) their_keys.insert(entry.name);
  }
  for (const auto& [key, value] : ours.tensors) {
    const bool is_ours = key.ends_with(".psoft_A") || key.ends_with(".psoft_B");  // PEFT makes anew
    if (!key.starts_with("graft.") && !is_ours) our_keys.insert(key);  // those PEFT passes over
    if (their_keys.contains(key)) {
      EXPECT_EQ(value.scalar_type(), theirs.read(key).scalar_type()) << key;
      expect_equal(value, theirs.read(key), key);
    }
  }
  EXPECT_EQ(our_keys, their_keys);
  const nlohmann::json config = config_of(directory);
  for (const auto& [entry, value] : config.items()) {
    if (is_compared(entry) && ours.config.contains(entry)) {
      EXPECT_EQ(ours.config[entry], value) << entry;
    }
  }
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(PeftOracle);
INSTANTIATE_TEST_SUITE_P(Directories, PeftOracle, testing::ValuesIn(adapter_names()),
                         [](const auto& info) { return info.param; });

// As `graft merge` does once a tied table has changed: head and embedding are then two.
TEST(PeftOracleTied, TrainedRowsMergeIntoBothTables) {
  if (oracle_root().empty()) GTEST_SKIP() << "GRAFT_ORACLE_DIR is not set";
  const std::string directory = directory_of("trainable_tokens_tied");
  nlohmann::json config = models::read_base_config(oracle_root() + "/llama_tied/model");
  Tiny tiny(config);
  tiny.attach("", nullptr, directory);
  tiny.load(dense());
  config["tie_word_embeddings"] = false;
  Tiny merged(config);
  merged.load(dense(), nullptr, [&](const std::string& name, const Tensor& w) {
    const bool is_head = name == "lm_head.weight";
    if (!is_head && name != "model.embed_tokens.weight") return w;
    const at::NoGradGuard no_grad;
    const LinearSite& site = *tiny.adapters.slots().find_linear(is_head ? "head" : "embed");
    return site.slot->adapters().front()->merged(fill("model.embed_tokens.weight", w.sizes(), 1));
  });
  const SafetensorsFile rows(oracle_root() + "/qwen2/oracle.safetensors");
  expect_equal(merged.logits(make_batch(rows.read("input_ids"), rows.read("labels"))),
               SafetensorsFile(directory + "/oracle.safetensors").read("logits"), "logits");
}

TEST(PeftOracleSum, OfWeightedAdaptersIsThatOfPeft) {
  if (oracle_root().empty()) GTEST_SKIP() << "GRAFT_ORACLE_DIR is not set";
  Tiny tiny{models::read_base_config(oracle_root() + "/qwen2/model")};
  tiny.adapters.attach_frozen(directory_of("lora"), 0.75);
  tiny.adapters.attach_frozen(directory_of("lora_rslora"), 0.5);
  tiny.load(dense());
  const SafetensorsFile rows(oracle_root() + "/qwen2/oracle.safetensors");
  const SafetensorsFile sums(oracle_root() + "/adapter_sums.safetensors");
  expect_equal(tiny.logits(make_batch(rows.read("input_ids"), rows.read("labels"))),
               sums.read("logits"), "logits");
}

TEST(PeftOracleDirectories, EveryTypeKnownHereHasOne) {
  if (oracle_root().empty()) GTEST_SKIP() << "GRAFT_ORACLE_DIR is not set";
  std::set<std::string> found;
  for (const std::string& name : adapter_names())
    found.insert(config_of(directory_of(name))["peft_type"].get<std::string>());
  // No prompts of these here yet; "": of no type; the files of the last: xlora_test.cpp.
  for (const char* type : {"", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE", "XLORA"})
    found.insert(type);
  for (const std::string& type : known_types()) EXPECT_TRUE(found.contains(type)) << type;
}

}  // namespace
}  // namespace graft::peft
