// graft inspect: what is in a file or folder, and whether it is sound.
#include "launcher/inspect.h"

#include <cstdio>

#include "configs/check.h"
#include "launcher/verbs/verbs.h"

namespace graft::launcher {
namespace {

struct InspectArguments {
  std::string path, model;
  bool json = false;
};

int run_inspect(const InspectArguments& arguments) {
  const Inspection result = inspect(arguments.path, arguments.model);
  std::fputs((arguments.json ? facts_json(result.facts) : facts_text(result.facts)).c_str(),
             stdout);
  return static_cast<int>(result.sound ? ExitCode::kDone : ExitCode::kData);
}

}  // namespace

void add_inspect(CLI::App& app, Command& command) {
  auto* verb = app.add_subcommand(
      "inspect", "What a file or folder holds, and whether it is sound (exit 3 if not)");
  auto arguments = std::make_shared<InspectArguments>();
  verb->add_option("PATH", arguments->path,
                   "adapter, checkpoint or model folder; token shard (.h5, read whole), .gguf or "
                   ".safetensors file")
      ->required();
  verb->add_option(
      "--model", arguments->model,
      "the base of an adapter: also whether it fits, is the one it was trained on, and "
      "what it changes");
  verb->add_flag("--json", arguments->json, "one JSON object on standard output");
  verb->footer(
      "Examples:\n  graft inspect runs/quickstart/adapter --model "
      "models/smollm2-135m-instruct.gguf\n  graft inspect "
      "data/cache/answers/train-000.h5 --json");
  verb->callback(
      [arguments, &command] { command.run = [arguments] { return run_inspect(*arguments); }; });
}

}  // namespace graft::launcher
