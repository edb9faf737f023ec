// graft export: an adapter in the form of another program.
#include "launcher/export.h"

#include <cstdio>

#include "launcher/verbs/verbs.h"

namespace graft::launcher {

namespace {

void print_report(const LoraReport& c) {
  std::printf("LoRA of rank %lld to %lld on %lld matrices; lost: %.3g %% of the change",
              static_cast<long long>(c.smallest_rank), static_cast<long long>(c.largest_rank),
              static_cast<long long>(c.num_matrices), 100 * c.lost);
  if (c.most_lost > 0) std::printf(", most at %s: %.3g %%", c.lost_most.c_str(), 100 * c.most_lost);
  std::printf("\n");
}

}  // namespace

void add_export(CLI::App& app, Command& command) {
  auto* verb = app.add_subcommand("export", "Write an adapter for other programs");
  auto options = std::make_shared<ExportOptions>();
  verb->add_option("--adapter", options->adapters,
                   "adapter folder; with --as lora several, innermost first, or DIR=WEIGHT; or a "
                   "LyCORIS file (with --to peft)")
      ->required();
  verb->add_option("--output", options->output, "folder (peft) or file to write; must not exist")
      ->required();
  verb->add_option(
          "--to", options->to,
          "peft: a clean folder | safetensors: one file | gguf: llama.cpp's LoRA adapter | "
          "lycoris: LyCORIS's file")
      ->required()
      ->check(CLI::IsMember({"peft", "safetensors", "gguf", "lycoris"}));
  verb->add_option("--model", options->model,
                   "the base: needed for gguf, lycoris and --as; otherwise checks that the adapter "
                   "fits it");
  verb->add_option("--as", options->as,
                   "lora: what adapters of any mergeable type do, as one LoRA on the plain base")
      ->check(CLI::IsMember({"lora"}));
  verb->add_option("--rank", options->rank,
                   "of --as lora; default: each change's own, so that nothing is lost")
      ->check(CLI::Range(1, 4096));
  verb->add_flag("--any-base", options->any_base, kAnyBase);
  verb->footer(
      "Examples:\n  graft export --adapter loha/adapter --to peft --as lora --model models/llama "
      "--output as-lora\n"
      "  graft export --adapter runs/quickstart/adapter --to gguf --model models/llama --output "
      "lora.gguf");
  verb->callback([options, &command] {
    command.run = [options] {
      const auto report = export_adapter(*options);
      std::printf("%s\n", options->output.c_str());
      if (report) print_report(*report);
      return 0;
    };
  });
}

}  // namespace graft::launcher
