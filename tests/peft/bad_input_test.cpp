// What a user or a stranger's file gets wrong, for every method at once: each is refused with the
// names and the values it is about.
#include <gtest/gtest.h>

#include "tests/peft/all_methods.h"
#include "tests/peft/tiny.h"

namespace graft::peft {
namespace {

using models::io::expect_refused;

std::shared_ptr<Method> with_fields(const std::string& name, const std::string& yaml) {
  std::shared_ptr<Method> method = registry().make(name);
  read_fields(*method, yaml);
  return method;
}

/// Attaches the method to the slots of a tiny Llama, 48 wide.
void attach(const std::string& name, const std::string& yaml, bool with_slots = true) {
  const auto model = models::make_model(tiny_config("llama"));
  SlotMap slots(*model);
  if (!with_slots) {
    slots.linears.clear(), slots.gains.clear(), slots.sublayers.clear(), slots.attentions.clear();
    slots.sequences.clear(), slots.tensors.clear(), slots.carries.clear(), slots.losses.clear();
    slots.weights.clear();
  }
  ParamSet params;
  AttachContext context{slots, model->info(), params, {7, 0}, at::kCPU, "0."};
  with_fields(name, yaml)->attach(context);
}

configs::FieldDoc fields_of(const std::string& name) {
  const auto method = registry().make(name);
  return configs::describe_section([&](configs::Fields& f) { method->fields(f); });
}

/// What r means where it is no rank of the update.
const std::map<std::string, std::string> kRIsNoRank = {
    {"adamss", "as PEFT it takes no more than there are"},
    {"deft", "as PEFT it takes no more than there are"},
    {"hra", "reflections"},
    {"lokr", "a large one means whole factors"},
    {"lora_sparse", "rank of an estimate of scores"},
    {"oft", "blocks"},
    {"peanut", "width of a network"},
    {"pvera", "a random projection may be wide"},
    {"randlora", "the more of them the fewer sums"},
    {"shira", "as many values as a LoRA of that rank"},
    {"tinylora", "as PEFT it takes no more than there are"},
    {"vera", "a random projection may be wide"},
};

TEST(BadInput, ARankLargerThanTheMatrixIsRefusedWithBoth) {
  int checked = 0;
  for (const std::string& name : registry().names()) {
    for (const auto& field : fields_of(name).members) {
      if ((field.name != "r" && field.name != "init_r") || kRIsNoRank.contains(name)) continue;
      SCOPED_TRACE(name);
      ++checked;
      try {
        attach(name, "{" + field.name + ": 2000}");
        ADD_FAILURE() << "accepted";
      } catch (const Error& error) {
        const std::string text = error.what();
        EXPECT_EQ(error.code(), ExitCode::kUsage) << text;
        for (const char* part : {"block.0.attn.q", "2000", "48"})
          EXPECT_NE(text.find(part), std::string::npos) << part << " in: " << text;
      }
    }
  }
  EXPECT_GE(checked, 10);
}

TEST(BadInput, AFileMayHoldARankLargerThanTheMatrix) {
  const TestFolder folder;
  Tiny tiny("llama");
  tiny.attach("lora", with_fields("lora", "{r: 4}"));
  tiny.load();
  Peft::Saved saved = tiny.adapters.save(0, {"base", "CAUSAL_LM", "print"});
  saved.config["r"] = 64;
  for (auto& [name, value] : saved.tensors) {
    const bool is_a = value.size(0) == 4;
    value = at::zeros({is_a ? 64 : value.size(0), is_a ? value.size(1) : 64});
  }
  Tiny::write_adapter(folder.path(), saved.config, saved.tensors);
  Tiny other("llama");
  other.adapters.attach_frozen(folder.path());
}

struct Division {
  std::string method, fields;
  std::vector<std::string> said;  ///< the slot, the value, and what would do
};

TEST(BadInput, ASizeThatDoesNotDivideIsAnsweredWithThoseThatDo) {
  const std::vector<Division> table = {
      {"boft", "{boft_block_size: 5}", {"block.0.attn.q", "5", "48"}},
      {"c3a", "{block_size: 7}", {"block.0.attn.q", "block_size = 7", "divisors of 48"}},
      {"gralora", "{r: 10, gralora_k: 5}", {"block.0.attn.q", "gralora_k = 5", "divisors of 48"}},
      {"krona", "{a_out: 5}", {"block.0.attn.q", "a_out = 5", "96"}},
      {"miss", "{r: 7, init_weights: bat}", {"block.0.attn.q", "r = 7", "divisor of 48"}},
      {"miss", "{r: 16, init_weights: mini, mini_r: 5}", {"block.0.attn.q", "mini_r = 5", "96"}},
      {"road", "{group_size: 10}", {"block.0.attn.q", "group_size = 10", "divisor"}},
      {"vblora", "{vector_length: 7}", {"block.0.attn.q", "vector_length = 7", "48"}},
  };
  for (const Division& row : table) {
    SCOPED_TRACE(row.method + " " + row.fields);
    try {
      attach(row.method, row.fields);
      ADD_FAILURE() << "accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage);
      for (const std::string& part : row.said)
        EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
            << part << " in: " << error.what();
    }
  }
}

TEST(BadInput, AModelWithoutItsSlotsIsRefusedByEveryMethod) {
  for (const std::string& name : registry().names()) {
    SCOPED_TRACE(name);
    expect_refused([&] { attach(name, defaults(name), /*with_slots=*/false); }, "peft",
                   ExitCode::kUsage);
  }
}

class SavedMethod : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    Tiny tiny("llama");
    const auto method = with_fields(GetParam(), defaults(GetParam()));
    if (method->acts_on_others()) GTEST_SKIP() << "is not saved";
    tiny.attach(GetParam(), method);
    tiny.load();
    saved_ = tiny.save_part(0);
    saved_.tensors = tiny.saved_tensors();
  }
  void expect_frozen_refused(const std::string& words) {
    std::filesystem::create_directories(folder_.path());
    std::ofstream(folder_.path() + "/adapter_config.json") << saved_.config.dump(2);
    models::io::write_safetensors(folder_.path() + "/adapter_model.safetensors", saved_.tensors,
                                  saved_.metadata);
    Tiny other("llama");
    expect_refused([&] { other.adapters.attach_frozen(folder_.path()); }, words);
  }

  TestFolder folder_;
  Peft::Saved saved_;
};

/// What a tensor belongs to: ".q_proj.lora_A.weight" to ".q_proj".
std::string module_of(std::string key) {
  if (key.ends_with(".weight")) key.resize(key.size() - 7);
  return key.substr(0, key.rfind('.'));
}

TEST_P(SavedMethod, WithAMissingTensorIsRefusedWithItsModule) {
  std::map<std::string, int> tensors_of;
  for (const auto& [key, value] : saved_.tensors) ++tensors_of[module_of(key)];
  const auto part = std::find_if(saved_.tensors.begin(), saved_.tensors.end(), [&](auto& named) {
    return named.first.starts_with("base_model.model.") && tensors_of[module_of(named.first)] > 1;
  });
  if (part == saved_.tensors.end())
    GTEST_SKIP() << "one tensor a module: a file without it adapts one module less";
  const std::string module = module_of(part->first);
  saved_.tensors.erase(part);
  expect_frozen_refused(module);
}

TEST_P(SavedMethod, WithAnUnknownTensorIsRefusedWithItsName) {
  saved_.tensors.emplace_back("base_model.model.model.layers.9.nothing.weight", at::ones({2}));
  expect_frozen_refused("unknown: base_model.model.model.layers.9.nothing.weight");
}

TEST_P(SavedMethod, WithAnUnknownTypeIsRefusedWithThoseThatAreKnown) {
  saved_.config["peft_type"] = "NO_SUCH";
  expect_frozen_refused("peft_type 'NO_SUCH' is not supported; known: ");
}

INSTANTIATE_TEST_SUITE_P(Every, SavedMethod, testing::ValuesIn(methods().names()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace graft::peft
