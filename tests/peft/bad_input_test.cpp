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
  const auto drop = [](auto&... lists) {  // with their memory, so that no stale slot is found
    ((lists = std::decay_t<decltype(lists)>()), ...);
  };
  if (!with_slots) {
    drop(slots.linears, slots.gains, slots.sublayers, slots.attentions, slots.sequences,
         slots.tensors, slots.carries, slots.losses, slots.weights);
  }
  ParamSet params;
  AttachContext context{slots, model->info(), params, {7, 0}, at::kCPU, "0.", false, name};
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
      {"boft",
       "{boft_block_size: 5}",
       {"block.0.attn.q", "5", "divisors of 48: 2, 3, 4, 6, 8, 12, 16, 24, 48"}},
      {"boft",
       "{boft_block_size: 5, boft_n_butterfly_factor: 3}",
       {"block.0.attn.q", "blocks of 5", "take an even one of the divisors of 12: 2, 3, 4, 6, 12"}},
      {"boft",
       "{boft_block_size: 3, boft_n_butterfly_factor: 2}",
       {"block.0.attn.q", "not 3",
        "take an even one of the divisors of 24: 2, 3, 4, 6, 8, 12, 24"}},
      {"boft",
       "{boft_block_size: 2, boft_n_butterfly_factor: 6}",
       {"block.0.attn.q", "blocks of 2", "take a smaller boft_n_butterfly_factor"}},
      {"bottleneck", "{reduction_factor: 49}", {"reduction_factor = 49", "at most", "48"}},
      {"c3a", "{block_size: 7}", {"block.0.attn.q", "block_size = 7", "divisors of 48"}},
      {"gralora", "{r: 10, gralora_k: 5}", {"block.0.attn.q", "gralora_k = 5", "divisors of 48"}},
      {"krona", "{a_out: 5}", {"block.0.attn.q", "a_out = 5", "96"}},
      {"miss", "{r: 7, init_weights: bat}", {"block.0.attn.q", "r = 7", "divisors of 48: 2, 3"}},
      {"miss",
       "{r: 16, init_weights: mini, mini_r: 5}",
       {"block.0.attn.q", "mini_r = 5", "divisors of 96: 2, 3"}},
      {"road", "{group_size: 10}", {"block.0.attn.q", "group_size = 10", "divisor"}},
      {"vblora",
       "{vector_length: 7}",
       {"block.0.attn.q", "vector_length = 7", "divisors of 48: 2, 3"}},
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

/// Where a method acts, if not at linear layers.
const std::map<std::string, std::string> kActsAt = {
    {"adapter_drop", "sublayers"},
    {"bottleneck", "sublayers"},
    {"freeze_layers", "tensors of the base"},
    {"full", "tensors of the base"},
    {"krona_b", "sublayers"},
    {"layernorm_tuning", "norms"},
    {"llama_adapter", "attention"},
    {"lora_sparse", "the losses of layers"},
    {"lorand", "sublayers"},
    {"mam", "attention"},
    {"p_tuning", "the input, before the tokens"},
    {"p_tuning_v2", "attention"},
    {"prefix_tuning", "attention"},
    {"prompt_tuning", "the input, before the tokens"},
    {"xlora", "the input, before the tokens"},
};

TEST(BadInput, AModelWithoutItsSlotsIsRefusedByEveryMethod) {
  for (const std::string& name : registry().names()) {
    SCOPED_TRACE(name);
    const std::string kind = kActsAt.contains(name) ? kActsAt.at(name) : "linear layers";
    const std::string said = registry().make(name)->acts_on_others()
                                 ? name + ": holds what methods before it in the list train"
                                 : name + " acts at " + kind + ", and this model (llama) has none";
    expect_refused([&] { attach(name, defaults(name), /*with_slots=*/false); }, "peft: " + said,
                   ExitCode::kUsage);
  }
}

struct Pair {
  std::string first, first_fields, second, second_fields, said;
};

TEST(BadInput, TwoMethodsThatExcludeEachOtherAreBothNamed) {
  const std::string eva = "{target_modules: attn.q, r: 2, init_lora_weights: eva}";
  const std::vector<Pair> table = {
      {"lora", "{modules_to_save: head}", "linear_probe", "{}",
       "linear_probe trains the head, which lora before it in the list trains already"},
      {"full", "{}", "freeze_layers", "{}", "is thawed by two methods, full and freeze_layers"},
      {"ia3", "{target_modules: [attn.k, mlp.down]}", "full", "{}",
       "block.0.attn.k.weight is trained whole, and block.0.attn.k has an adapter too: of full and"
       " ia3"},
      {"lora", eva, "fish_mask", "{keep: 0.1}",
       "fish_mask looks at one document at a time and cannot be combined with lora, which"},
      {"fish_mask", "{keep: 0.1}", "lora", eva,
       "fish_mask looks at one document at a time and cannot be combined with lora, which"},
      {"prompt_tuning", "{num_virtual_tokens: 3}", "lora", eva,
       "lora starts from data and cannot be combined with prompt_tuning, which"},
  };
  for (const Pair& row : table) {
    SCOPED_TRACE(row.first + ", " + row.second);
    Tiny tiny("llama");
    tiny.attach(row.first, with_fields(row.first, row.first_fields));
    tiny.attach(row.second, with_fields(row.second, row.second_fields));
    expect_refused([&] { tiny.load(); }, row.said, ExitCode::kUsage);
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

TEST_P(SavedMethod, WithoutOneOfItsTensorsIsRefusedWithItsModule) {
  const std::string module = module_of(saved_.tensors.front().first);  // of what is trained
  saved_.tensors.erase(saved_.tensors.begin());
  expect_frozen_refused(saved_.tensors.empty() ? "" : module);
}

TEST_P(SavedMethod, WithoutAllTensorsOfAModuleIsRefusedWithIt) {
  const std::string module = module_of(saved_.tensors.front().first);
  std::erase_if(saved_.tensors,
                [&](const auto& named) { return module_of(named.first) == module; });
  std::string said = module.substr(0, module.find(".osf_"));  // which stand in a module of theirs
  if (GetParam() == "lora_sparse") said = "does not fit this model";  // of a layer, not a module
  expect_frozen_refused(saved_.tensors.empty() ? "" : said);
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
