// graft models: the model families, and the sizes whose shapes are shipped.
#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "configs/check.h"
#include "configs/names.h"
#include "launcher/facts.h"
#include "launcher/verbs/verbs.h"
#include "launcher/version.h"
#include "models/base.h"
#include "peft/slot_map.h"

namespace graft::launcher {
namespace {

namespace fs = std::filesystem;

struct ModelsArguments {
  std::string name;
  bool json = false;
};

/// Stems of configs/models/*.yaml.
std::vector<std::string> shapes() {
  std::vector<std::string> stems;
  for (const auto& entry : fs::directory_iterator(source_dir() + "/configs/models")) {
    if (entry.path().extension() == ".yaml") stems.push_back(entry.path().stem());
  }
  std::sort(stems.begin(), stems.end());
  return stems;
}

std::string shape_path(const std::string& stem) {
  return source_dir() + "/configs/models/" + stem + ".yaml";
}

Facts catalogue() {
  Facts facts{{"families", Facts::object()}, {"shapes", Facts::object()}};
  for (const auto& family : models::families()) {
    facts["families"][family.name] = {{"summary", family.summary},
                                      {"model_types", family.model_types}};
  }
  for (const std::string& stem : shapes()) {
    const auto model = models::make_model(models::read_base_config(shape_path(stem)));
    facts["shapes"][stem] = {{"family", model->info().family},
                             {"model_type", model->info().model_type},
                             {"parameters", num_parameters(*model)},
                             {"path", shape_path(stem)}};
  }
  return facts;
}

void print_catalogue(const Facts& facts) {
  std::printf("families:\n");
  for (const auto& [name, family] : facts["families"].items()) {
    std::printf("  %-14s %s\n  %-14s model_type: %s\n", name.c_str(),
                family["summary"].get<std::string>().c_str(), "",
                configs::join(family["model_types"].get<std::vector<std::string>>(), ", ").c_str());
  }
  std::printf("shapes (configs/models, without weights):\n");
  for (const auto& [name, shape] : facts["shapes"].items()) {
    std::printf("  %-14s %-9s %12s parameters\n", name.c_str(),
                shape["model_type"].get<std::string>().c_str(),
                count_text(shape["parameters"]).c_str());
  }
}

/// One model: shape, sizes, and what target_modules may name.
Facts model_facts(const std::string& path) {
  const auto config = models::read_base_config(path);
  const auto model = models::make_model(config);
  const models::ModelInfo info = model->info();
  std::vector<std::string> roles;
  const peft::SlotMap slots(*model);
  for (const auto& site : slots.linears) {
    if (std::find(roles.begin(), roles.end(), site.role) == roles.end()) roles.push_back(site.role);
  }
  return {{"path", path},
          {"family", info.family},
          {"model_type", info.model_type},
          {"hf_class", info.hf_class},
          {"parameters", num_parameters(*model)},
          {"hidden_size", info.hidden_size},
          {"num_layers", info.num_layers},
          {"vocab_size", info.vocab_size},
          {"max_length", info.max_length},
          {"tied_head", info.tied_head},
          {"target_modules", roles},
          {"config", config}};
}

int models_verb(const ModelsArguments& arguments) {
  Facts facts;
  if (arguments.name.empty()) {
    facts = catalogue();
    if (!arguments.json) return print_catalogue(facts), 0;
  } else {
    const auto known = shapes();
    const bool shipped = std::find(known.begin(), known.end(), arguments.name) != known.end();
    GRAFT_CHECK(shipped || fs::exists(arguments.name), "models: '", arguments.name,
                "' is neither a shipped shape nor a path", configs::suggest(arguments.name, known));
    facts = model_facts(shipped ? shape_path(arguments.name) : arguments.name);
  }
  std::fputs((arguments.json ? facts_json(facts) : facts_text(facts)).c_str(), stdout);
  return 0;
}

}  // namespace

void add_models(CLI::App& app, Command& command) {
  auto* verb = app.add_subcommand("models", "The model families and shipped shapes, or one model");
  auto arguments = std::make_shared<ModelsArguments>();
  verb->add_option("NAME", arguments->name, "a shape of configs/models, or the path of a model");
  verb->add_flag("--json", arguments->json, "one JSON object on standard output");
  verb->footer("Examples:\n  graft models\n  graft models llama3_8b --json");
  verb->callback(
      [arguments, &command] { command.run = [arguments] { return models_verb(*arguments); }; });
}

}  // namespace graft::launcher
