// graft methods: the catalogue of methods, or all there is to know of one.
#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "configs/check.h"
#include "configs/names.h"
#include "launcher/facts.h"
#include "launcher/verbs/verbs.h"
#include "launcher/version.h"
#include "models/base.h"
#include "peft/peft.h"

namespace graft::launcher {
namespace {

namespace fs = std::filesystem;

struct MethodsArguments {
  std::string name, model;
  bool json = false;
};

/// What a method with its defaults does to one model.
struct Trial {
  std::vector<std::string> roles;  ///< slots it acts at, by role
  bool mergeable = true;
  int64_t trained = 0, base = 0;  ///< parameters
};

template <class Sites>
void add_roles(const Sites& sites, std::vector<std::string>& roles) {
  for (const auto& site : sites) {
    const bool is_new = std::find(roles.begin(), roles.end(), site.role) == roles.end();
    if (!site.slot->empty() && is_new) roles.push_back(site.role);
  }
}

/// @throws graft::Error if the method does not fit the model
Trial attach(const std::string& method, const std::string& model_path) {
  const auto model = models::make_model(models::read_base_config(model_path));
  peft::Peft adapters(*model, at::kCPU, 0);
  std::vector<peft::MethodEntry> entries{{method, peft::methods().make(method), std::nullopt}};
  if (entries.front().method->acts_on_others())
    entries.insert(entries.begin(), {"lora", peft::methods().make("lora"), std::nullopt});
  adapters.attach(entries);
  const peft::SlotMap& slots = adapters.slots();
  Trial trial;
  add_roles(slots.sublayers, trial.roles), add_roles(slots.attentions, trial.roles),
      add_roles(slots.sequences, trial.roles);
  add_roles(slots.tensors, trial.roles), add_roles(slots.carries, trial.roles),
      add_roles(slots.losses, trial.roles);
  trial.mergeable = trial.roles.empty();  // so far: anything but matrices
  for (const auto* sites : {&slots.linears, &slots.gains}) {
    add_roles(*sites, trial.roles);
    for (const auto& site : *sites) {
      for (const auto& adapter : site.slot->adapters())
        trial.mergeable = trial.mergeable && adapter->mergeable();
    }
  }
  trial.trained = entries.size() == 1 ? adapters.params().numel() : 0;
  trial.base = num_parameters(*model);
  return trial;
}

/// The shipped shape with the fewest parameters of each family.
std::map<std::string, std::string> smallest_shapes() {
  std::map<std::string, std::pair<int64_t, std::string>> smallest;
  for (const auto& entry : fs::directory_iterator(source_dir() + "/configs/models")) {
    if (entry.path().extension() != ".yaml") continue;
    const auto model = models::make_model(models::read_base_config(entry.path()));
    const std::pair shape{num_parameters(*model), entry.path().string()};
    const auto [best, is_new] = smallest.emplace(model->info().family, shape);
    if (!is_new) best->second = std::min(best->second, shape);
  }
  std::map<std::string, std::string> paths;
  for (const auto& [family, shape] : smallest) paths[family] = shape.second;
  return paths;
}

/// Families it can be put on, and what it does there.
void add_fit(const std::string& method, Facts& facts) {
  std::vector<std::string> fits;
  Trial trial;
  for (const auto& [family, shape] : smallest_shapes()) {
    try {
      trial = attach(method, shape);
      fits.push_back(family);
    } catch (const Error&) {  // it does not fit, which is the answer
    }
  }
  facts["families"] = fits;
  facts["slots_by_default"] = trial.roles;
  facts["mergeable"] = trial.mergeable && !fits.empty();
}

/// All keys of an entry of the `peft` list with this method.
configs::FieldDoc fields_of(const std::string& method) {
  peft::MethodEntry entry{method, peft::methods().make(method), std::nullopt};
  return configs::describe_section([&](configs::Fields& f) { entry.fields(f); });
}

/// The forms `graft export` and `graft merge` can give it.
std::vector<std::string> forms(const std::string& peft_type, bool mergeable) {
  std::vector<std::string> names;
  if (!peft_type.empty()) names = {"peft", "safetensors"};
  if (peft_type == "LORA") names.emplace_back("gguf");
  if (mergeable) names.emplace_back("merged model");
  return names;
}

Facts method_facts_of(const peft::MethodFacts& method, const std::string& model) {
  const std::string type = peft::methods().make(method.name)->peft_type();
  Facts facts{{"name", method.name},
              {"group", method.group},
              {"paper", method.paper},
              {"formula", method.summary}};
  facts["peft_type"] = type.empty() ? Facts(nullptr) : Facts(type);
  add_fit(method.name, facts);
  facts["exports_to"] = forms(type, facts["mergeable"]);
  if (!model.empty()) {
    const Trial trial = attach(method.name, model);
    facts["on_model"] = {
        {"model", model},
        {"slots", trial.roles},
        {"trained_parameters", trial.trained},
        {"base_parameters", trial.base},
        {"share", static_cast<double>(trial.trained) / static_cast<double>(trial.base)}};
  }
  return facts;
}

int methods_verb(const MethodsArguments& arguments) {
  const auto& all = peft::method_facts();
  if (arguments.name.empty()) {
    GRAFT_CHECK(arguments.model.empty(), "methods: --model needs the name of a method");
    Facts list = Facts::array();
    for (const auto& m : all)
      list.push_back(
          {{"name", m.name}, {"group", m.group}, {"paper", m.paper}, {"formula", m.summary}});
    if (arguments.json) return std::fputs(facts_json({{"methods", list}}).c_str(), stdout), 0;
    std::string group;
    for (const auto& m : all) {  // methods.def is in the order of groups
      if (m.group != group) std::printf("%s:\n", m.group.c_str());
      group = m.group;
      std::printf("  %-16s %-40s %s\n", m.name.c_str(), m.summary.c_str(), m.paper.c_str());
    }
    return 0;
  }
  peft::methods().at(arguments.name);  // an unknown name is answered with the nearest
  const auto& method = *std::find_if(all.begin(), all.end(),
                                     [&](const auto& m) { return m.name == arguments.name; });
  Facts facts = method_facts_of(method, arguments.model);
  if (arguments.json) {
    facts["fields"] = configs::json_schema(fields_of(method.name))["properties"];
    std::fputs(facts_json(facts).c_str(), stdout);
  } else {
    std::printf("%sfields:\n%s", facts_text(facts).c_str(),
                configs::describe_text(fields_of(method.name)).c_str());
  }
  return 0;
}

}  // namespace

void add_methods(CLI::App& app, Command& command) {
  auto* verb = app.add_subcommand("methods", "The methods, or one with its fields");
  auto arguments = std::make_shared<MethodsArguments>();
  verb->add_option("NAME", arguments->name, "a method");
  verb->add_option("--model", arguments->model,
                   "count what it trains, with its defaults, on this model or shape file");
  verb->add_flag("--json", arguments->json, "one JSON object on standard output");
  verb->footer(
      "Examples:\n  graft methods\n  graft methods lora --model configs/models/llama3_8b.yaml");
  verb->callback(
      [arguments, &command] { command.run = [arguments] { return methods_verb(*arguments); }; });
}

}  // namespace graft::launcher
