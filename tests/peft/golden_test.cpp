// Methods against HF PEFT: adapters that PEFT computed with (tests/golden/peft_adapters.json: loss,
// logits, gradients) and the files that PEFT writes (peft_files.json: names, shapes, config
// entries).
#include <gtest/gtest.h>

#include <sstream>

#include "tests/peft/tiny.h"

namespace graft::peft {
namespace {

using models::io::expect_refused;

constexpr double kTolerance = 1e-4;

models::LoadOptions unquantised() {
  models::LoadOptions options;
  options.quantization = models::Quantization::kNone;
  return options;
}

Tensor int64_tensor(const nlohmann::json& rows) {
  std::vector<int64_t> flat;
  for (const auto& row : rows) flat.insert(flat.end(), row.begin(), row.end());
  return at::tensor(flat).reshape({static_cast<int64_t>(rows.size()), -1});
}

data::Batch golden_batch() {
  const nlohmann::json file = golden("llama_tiny.json");
  return make_batch(int64_tensor(file["input_ids"]), int64_tensor(file["labels"]));
}

/// The golden's adapter as a PEFT directory.
void write_golden(const std::string& directory, const nlohmann::json& adapter) {
  models::io::NamedTensors tensors;
  for (const auto& [key, rule] : adapter["tensors"].items()) {  // dtype, shape, offset, scale
    const auto shape = rule[1].get<std::vector<int64_t>>();
    tensors.emplace_back(key, fill(key, shape, rule[3].get<double>()) + rule[2].get<double>());
  }
  nlohmann::json config = adapter["config"];
  config["peft_type"] = adapter["peft_type"];
  Tiny::write_adapter(directory, config, tensors);
}

void expect_near(const Tensor& ours, const nlohmann::json& expected, const std::string& what) {
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(ours[static_cast<int64_t>(i)].item<double>(), expected[i].get<double>(), kTolerance)
        << what << " " << i;
  }
}

void expect_logits(Tiny& tiny, const nlohmann::json& adapter) {
  const Tensor logits_BLV = tiny.logits(golden_batch());
  expect_near(logits_BLV[0][-1], adapter["logits_row0_last"], "last row 0");
  expect_near(logits_BLV[1][3], adapter["logits_row1_pos3_first8"], "row 1, position 3");
}

class GoldenAdapter : public testing::TestWithParam<const char*> {
 protected:
  nlohmann::json adapter = golden("peft_adapters.json")["adapters"][GetParam()];
  TestFolder folder;
  Tiny tiny{golden("llama_tiny.json")["cases"]["llama_default"]["config"]};
  void SetUp() override { write_golden(folder.path(), adapter); }
};

TEST_P(GoldenAdapter, TrainedFromItsFilesHasPeftsLossAndGradients) {
  tiny.attach("", nullptr, folder.path());
  tiny.load(unquantised());
  tiny.training = false;  // as PEFT was
  const auto [loss, gradients] = tiny.sweep({{golden_batch(), 0}}, 1);
  EXPECT_NEAR(loss, adapter["loss"].get<double>(), kTolerance);
  expect_logits(tiny, adapter);
  const auto& expected = adapter["grad_l2norm_and_first2"];
  if (expected.is_null()) return;  // of prompts the golden has none
  size_t found = 0;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const std::string& key = tiny.params()[i].hf_key;
    if (key == "base_model.vblora_vector_bank") continue;  // the golden has no gradient of it
    ++found;
    ASSERT_TRUE(expected.contains(key)) << key;
    expect_near(at::cat({gradients[i].norm().reshape({1}), gradients[i].flatten().slice(0, 0, 2)}),
                expected[key], key);
  }
  EXPECT_EQ(found, expected.size());
}

TEST_P(GoldenAdapter, FrozenUnderTheRunItHasPeftsLogits) {
  tiny.adapters.attach_frozen(folder.path());
  tiny.load(unquantised());
  EXPECT_TRUE(tiny.params().empty());
  expect_logits(tiny, adapter);
}

INSTANTIATE_TEST_SUITE_P(Peft, GoldenAdapter,
                         testing::Values("LORA_all_linear", "LORA_rslora", "LORA_modules_to_save",
                                         "LORA_embed", "LORA_rank_pattern", "LORA_dora",
                                         "LORA_bias", "LORA_trainable_tokens", "ADALORA", "BOFT",
                                         "DELORA", "HRA", "IA3", "OFT_exact", "OFT_neumann",
                                         "PVERA", "RANDLORA", "ROAD", "TRAINABLE_TOKENS", "VBLORA",
                                         "VERA", "C3A", "FOURIERFT", "GRALORA", "HIRA", "LN_TUNING",
                                         "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "LOHA",
                                         "LOKR", "LOKR_both", "MISS", "MISS_bat"),
                         [](const auto& info) { return std::string(info.param); });

TEST(GoldenAdapters, WhatIsNotSupportedIsRefusedByName) {
  const nlohmann::json adapters = golden("peft_adapters.json")["adapters"];
  std::set<std::string> known;
  for (const auto& entry : methods().entries()) known.insert(entry.make()->peft_type());
  for (const auto& [name, adapter] : adapters.items()) {
    const TestFolder folder;
    write_golden(folder.path(), adapter);
    Tiny tiny("llama");
    const std::string type = adapter["peft_type"];
    if (!known.contains(type)) {
      expect_refused([&] { tiny.adapters.attach_frozen(folder.path()); },
                     "peft_type '" + type + "' is not supported");
    }
  }
}

// --- the files

struct FileCase {
  const char* golden;   ///< name in peft_files.json
  const char* options;  ///< ours for it
  bool biases = false, tied = false;
};
void PrintTo(const FileCase& c, std::ostream* out) { *out << c.golden; }

class PeftFiles : public testing::TestWithParam<FileCase> {
 protected:
  static nlohmann::json base_config() {
    nlohmann::json config = golden("llama_tiny.json")["cases"]["llama_default"]["config"];
    config.update({{"num_hidden_layers", 1},
                   {"head_dim", 8},
                   {"attention_bias", GetParam().biases},
                   {"mlp_bias", GetParam().biases},
                   {"tie_word_embeddings", GetParam().tied}});
    return config;
  }
  /// What PEFT wrote.
  nlohmann::json theirs() const {
    const nlohmann::json file = golden("peft_files.json");
    nlohmann::json config =
        nlohmann::json::parse(file["lora_adapter_config_text"].get<std::string>());
    nlohmann::json changes = file["lora"][GetParam().golden]["config_changes"];
    if (changes["target_modules"].is_string()) changes.erase("target_modules");  // "see full text"
    config.update(changes);
    return {{"config", config}, {"tensors", file["lora"][GetParam().golden]["tensors"]}};
  }
  Peft::Saved ours() {
    std::shared_ptr<Method> method = methods().make("lora");
    read_fields(*method, GetParam().options);
    std::vector<MethodEntry> entries = {{"lora", method, std::nullopt}};
    adapters.attach(entries);
    return adapters.save(0, {"BASE", "CAUSAL_LM", "print"});
  }
  std::unique_ptr<models::Model> model = models::make_model(base_config());
  Peft adapters{*model, at::kCPU, 7};
};

TEST_P(PeftFiles, NamesAndShapesAreThose) {
  nlohmann::json tensors;
  for (const auto& [key, value] : ours().tensors) {
    std::ostringstream shape;
    for (int64_t d = 0; d < value.dim(); ++d) shape << (d == 0 ? "" : ", ") << value.size(d);
    tensors[key] = "F32 [" + shape.str() + "]";
  }
  EXPECT_EQ(tensors, theirs()["tensors"]);
}

/// The modules of a model that a list of PEFT's means.
std::set<std::string> modules_of(const nlohmann::json& list, const SlotMap& slots) {
  std::set<std::string> found;
  if (list.is_null()) return found;
  for (const auto& entry : list) {
    for (const LinearSite& site : slots.linears) {
      const std::string suffix = entry.get<std::string>();
      if (site.hf_path == suffix || site.hf_path.ends_with("." + suffix))
        found.insert(site.hf_path);
    }
  }
  return found;
}

/// Each adapted module's value of a pattern.
nlohmann::json values_of(const nlohmann::json& config, const char* pattern, const char* fallback,
                         const SlotMap& slots) {
  nlohmann::json values;
  for (const std::string& module : modules_of(config["target_modules"], slots)) {
    values[module] = config[fallback];
    for (const auto& [key, value] : config[pattern].items()) {
      if (modules_of({key}, slots).contains(module)) values[module] = value;
    }
  }
  return values;
}

TEST_P(PeftFiles, ConfigEntriesAgree) {
  const nlohmann::json expected = theirs()["config"], config = ours().config;
  const SlotMap& slots = adapters.slots();
  for (const char* list : {"target_modules", "modules_to_save"}) {
    EXPECT_EQ(modules_of(config[list], slots), modules_of(expected[list], slots)) << list;
  }
  EXPECT_EQ(values_of(config, "rank_pattern", "r", slots),
            values_of(expected, "rank_pattern", "r", slots));
  EXPECT_EQ(values_of(config, "alpha_pattern", "lora_alpha", slots),
            values_of(expected, "alpha_pattern", "lora_alpha", slots));
  int compared = 0;
  for (const auto& [key, value] : config.items()) {
    if (!expected.contains(key) || key == "target_modules" || key == "modules_to_save" ||
        key.ends_with("_pattern"))
      continue;
    ++compared;
    EXPECT_EQ(value, expected[key]) << key;
  }
  EXPECT_GE(compared, 10);
}

TEST_P(PeftFiles, WhatWeWriteWeRead) {
  const TestFolder folder;
  const Peft::Saved saved = ours();
  Tiny::write_adapter(folder.path(), saved.config, saved.tensors);
  const auto fresh = models::make_model(base_config());
  Peft other(*fresh, at::kCPU, 8);
  std::vector<MethodEntry> entries = {{"", nullptr, folder.path()}};
  other.attach(entries);
  other.load(folder.path());
  EXPECT_EQ(other.params().hash(), adapters.params().hash());
  EXPECT_EQ(other.save(0, {"BASE", "CAUSAL_LM", "print"}).config, saved.config);
}

constexpr const char* kQuery = "{r: 4, target_modules: q_proj}";
INSTANTIATE_TEST_SUITE_P(
    Lora, PeftFiles,
    testing::Values(
        FileCase{"plain", "{r: 4, target_modules: all-linear}"},
        FileCase{"lora_bias", "{r: 4, target_modules: q_proj, lora_bias: true}"},
        FileCase{"rslora", "{r: 4, target_modules: q_proj, use_rslora: true}"},
        FileCase{"rankpat",
                 "{r: 4, target_modules: [q_proj, v_proj], rank_pattern: {v_proj: 6},"
                 " alpha_pattern: {v_proj: 12}}"},
        FileCase{"mts", "{r: 4, target_modules: q_proj, modules_to_save: lm_head}"},
        FileCase{"embed_nosave", "{r: 4, target_modules: [embed_tokens, q_proj]}"},
        FileCase{"lmhead_nosave", "{r: 4, target_modules: [lm_head, q_proj]}"},
        FileCase{"bias_all", "{r: 4, target_modules: q_proj, bias: all}"},
        FileCase{"bias_all_b", "{r: 4, target_modules: q_proj, bias: all}", true},
        FileCase{"bias_lora_only_b", "{r: 4, target_modules: q_proj, bias: lora_only}", true},
        FileCase{"bf16base", kQuery},
        FileCase{"tied_mts", "{r: 4, target_modules: q_proj, modules_to_save: lm_head}", false,
                 true},
        FileCase{"tied_mts_e", "{r: 4, target_modules: q_proj, modules_to_save: embed_tokens}",
                 false, true}),
    [](const auto& info) { return std::string(info.param.golden); });

}  // namespace
}  // namespace graft::peft
