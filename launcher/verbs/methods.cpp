// graft methods: the catalogue of methods, or all there is to know of one.
#include <algorithm>
#include <cstdio>

#include "configs/check.h"
#include "launcher/method_sheet.h"
#include "launcher/verbs/verbs.h"

namespace graft::launcher {
namespace {

struct MethodsArguments {
  std::string name, model;
  bool json = false;
};

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
  Facts facts = method_sheet(method, arguments.model.empty() ? default_shape() : arguments.model);
  if (arguments.json) {
    facts["fields"] = configs::json_schema(method_fields(method.name))["properties"];
    std::fputs(facts_json(facts).c_str(), stdout);
  } else {
    std::printf("%sfields:\n%s", facts_text(facts).c_str(),
                configs::describe_text(method_fields(method.name)).c_str());
  }
  return 0;
}

}  // namespace

void add_methods(CLI::App& app, Command& command) {
  auto* verb = app.add_subcommand("methods", "The methods, or one with its fields");
  auto arguments = std::make_shared<MethodsArguments>();
  verb->add_option("NAME", arguments->name, "a method");
  verb->add_option(
      "--model", arguments->model,
      "where to count what it trains with its defaults: a model or shape file; default: the "
      "quickstart's shape");
  verb->add_flag("--json", arguments->json, "one JSON object on standard output");
  verb->footer(
      "Examples:\n  graft methods\n  graft methods lora --model configs/models/llama3_8b.yaml");
  verb->callback(
      [arguments, &command] { command.run = [arguments] { return methods_verb(*arguments); }; });
}

}  // namespace graft::launcher
