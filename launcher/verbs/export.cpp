// graft export: an adapter in the form of another program.
#include "launcher/export.h"

#include <cstdio>

#include "launcher/verbs/verbs.h"

namespace graft::launcher {

void add_export(CLI::App& app, Command& command) {
  auto* verb = app.add_subcommand("export", "Write an adapter for other programs");
  auto options = std::make_shared<ExportOptions>();
  verb->add_option("--adapter", options->adapter, "adapter folder")->required();
  verb->add_option("--output", options->output, "folder (peft) or file to write; must not exist")
      ->required();
  verb->add_option("--to", options->to,
                   "peft: a clean folder | safetensors: one file | gguf: llama.cpp's LoRA adapter")
      ->required()
      ->check(CLI::IsMember({"peft", "safetensors", "gguf"}));
  verb->add_option("--model", options->model,
                   "the base: needed for gguf; otherwise checks that the adapter fits it");
  verb->footer(
      "Examples:\n  graft export --adapter runs/quickstart/adapter --to peft --output my-adapter\n"
      "  graft export --adapter runs/quickstart/adapter --to gguf --model models/llama --output "
      "lora.gguf");
  verb->callback([options, &command] {
    command.run = [options] {
      export_adapter(*options);
      std::printf("%s\n", options->output.c_str());
      return 0;
    };
  });
}

}  // namespace graft::launcher
