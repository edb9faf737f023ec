// The verbs of the command line: one file a verb, each with one function that declares its
// arguments and what it does.
#pragma once

#include <CLI/CLI.hpp>

#include <functional>
#include <string>
#include <vector>

#include "dist/comm_factory.h"
#include "dist/topology.h"

namespace graft::launcher {

/// What the parsed command line asks for.
struct Command {
  std::function<int()> run;  ///< a verb of one process; returns the exit code
  /// A verb that all ranks of the job run together. `session` is null in a world of one.
  std::function<int(const dist::Topology& topology, dist::MpiSession* session)> run_on_ranks;
};

void add_train(CLI::App& app, Command& command);
void add_eval(CLI::App& app, Command& command);
void add_generate(CLI::App& app, Command& command);
void add_prepare(CLI::App& app, Command& command);
void add_validate(CLI::App& app, Command& command);
void add_methods(CLI::App& app, Command& command);
void add_models(CLI::App& app, Command& command);
void add_inspect(CLI::App& app, Command& command);
void add_merge(CLI::App& app, Command& command);
void add_export(CLI::App& app, Command& command);
void add_fuse(CLI::App& app, Command& command);
void add_completion(CLI::App& app, Command& command);
void add_env(CLI::App& app, Command& command);

/// Help of the flag that several verbs have.
inline constexpr const char* kAnyBase =
    "take adapters that were trained on a base with another fingerprint";

/// CONFIG and `section.key=value ...` of a verb that takes a run file.
struct RunArguments {
  std::string config;
  std::vector<std::string> overrides;
};
void add_run_arguments(CLI::App& verb, RunArguments& arguments);

}  // namespace graft::launcher
