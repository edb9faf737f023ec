// graft validate: every mistake of a run file in one pass, without loading anything.
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "launcher/dry_run.h"
#include "launcher/verbs/verbs.h"

namespace graft::launcher {
namespace {

struct ValidateArguments {
  RunArguments run;
  bool schema_only = false, print_schema = false;
};

int validate(const ValidateArguments& arguments) {
  if (arguments.print_schema) {
    std::printf("%s\n", configs::json_schema(configs::describe(Run{})).dump(2).c_str());
    return 0;
  }
  GRAFT_CHECK(!arguments.run.config.empty(), "validate: name a config file");
  const auto& [config, overrides] = arguments.run;
  if (arguments.schema_only) {
    configs::load_config<Run>(config, overrides);
  } else {
    load_checked_run(config, overrides);
  }
  std::printf("%s: ok\n", arguments.run.config.c_str());
  return 0;
}

}  // namespace

void add_run_arguments(CLI::App& verb, RunArguments& arguments) {
  verb.add_option("CONFIG", arguments.config, "run file (YAML)")->required();
  verb.add_option("OVERRIDES", arguments.overrides,
                  "section.key=value ...; all keys and defaults: graft validate --print-schema");
}

void add_validate(CLI::App& app, Command& command) {
  auto* verb = app.add_subcommand("validate", "Check a run file: every mistake in one pass");
  auto arguments = std::make_shared<ValidateArguments>();
  verb->add_option("CONFIG", arguments->run.config, "run file (YAML)");
  verb->add_option("OVERRIDES", arguments->run.overrides, "section.key=value ...");
  verb->add_flag("--schema-only", arguments->schema_only, "do not look for files");
  verb->add_flag("--print-schema", arguments->print_schema,
                 "list all keys with type, range and default (JSON schema, for editors too)");
  verb->footer(
      "Examples:\n  graft validate configs/runs/quickstart.yaml\n"
      "  graft validate run.yaml train.learning_rate=1e-4 --schema-only");
  verb->callback(
      [arguments, &command] { command.run = [arguments] { return validate(*arguments); }; });
}

}  // namespace graft::launcher
