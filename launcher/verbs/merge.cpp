// graft merge: adapters into the base, with a report of what rounding leaves of them.
#include "launcher/merge.h"

#include <algorithm>
#include <cstdio>

#include "launcher/progress.h"
#include "launcher/verbs/verbs.h"

namespace graft::launcher {
namespace {

int run_merge(const MergeOptions& options) {
  MergeReport report = merge(options);
  std::printf("%s: %lld file(s), %s\n", options.output.c_str(),
              static_cast<long long>(report.num_files), bytes_text(report.bytes).c_str());
  if (!report.without_tokenizer.empty()) {
    std::printf("  without a tokenizer, add one before generating: %s\n",
                report.without_tokenizer.c_str());
  }
  std::printf(
      "survives rounding: %.4f %% of the change, %zu tensors; rounding adds noise of %.3g times "
      "its size\n",
      100 * report.total.share(), report.tensors.size(), report.total.noise_ratio());
  if (report.total.share() < 0.5) {
    std::printf("  rounding takes most of the change away; %s keeps it\n",
                options.quantization == "none" ? "--dtype float32" : "--quantization none");
  }
  if (report.total.share() > 0.999) return 0;
  constexpr size_t kWorst = 3;
  std::sort(report.tensors.begin(), report.tensors.end(),
            [](const Survival& a, const Survival& b) { return a.share() < b.share(); });
  for (size_t i = 0; i < std::min(kWorst, report.tensors.size()); ++i) {
    std::printf("  %8.4f %%  %s\n", 100 * report.tensors[i].share(),
                report.tensors[i].name.c_str());
  }
  return 0;
}

}  // namespace

void add_merge(CLI::App& app, Command& command) {
  auto* verb = app.add_subcommand("merge", "Write base and adapters as one Hugging Face model");
  auto options = std::make_shared<MergeOptions>();
  verb->add_option("--model", options->model, "the base: Hugging Face folder or GGUF file")
      ->required();
  verb->add_option("--adapter", options->adapters,
                   "adapter folder, or DIR=WEIGHT; several are merged in order")
      ->required();
  verb->add_option("--output", options->output, "folder to make; must not exist or be empty")
      ->required();
  verb->add_option("--dtype", options->dtype,
                   "auto: as stored, float32 where the base is quantised")
      ->check(CLI::IsMember({"auto", "float32", "bfloat16"}))
      ->capture_default_str();
  verb->add_option("--quantization", options->quantization,
                   "of the output's blocks: nf4 or fp4 as bitsandbytes writes them")
      ->check(CLI::IsMember({"none", "nf4", "fp4"}))
      ->capture_default_str();
  verb->add_flag("!--no-double-quantization", options->double_quantization,
                 "scales of 4-bit blocks in float32");
  verb->add_flag("--any-base", options->any_base, kAnyBase);
  verb->add_option("--max-file-bytes", options->max_file_bytes,
                   "a larger model is cut into several files")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 50, "BYTES"))
      ->capture_default_str();
  verb->footer(
      "Examples:\n  graft merge --model models/llama --adapter runs/quickstart/adapter --output "
      "models/merged\n"
      "  graft merge --model m.gguf --adapter a b --output merged --quantization nf4");
  verb->callback([options, &command] { command.run = [options] { return run_merge(*options); }; });
}

}  // namespace graft::launcher
