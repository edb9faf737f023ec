// graft generate: text from a base with adapters, streamed to the terminal or written to a file.
#include <nlohmann/json.hpp>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <utility>

#include "configs/check.h"
#include "launcher/checkpoint/manifest.h"
#include "launcher/facts.h"
#include "launcher/generate.h"
#include "launcher/tokenizer_pipe.h"
#include "launcher/verbs/verbs.h"

namespace graft::launcher {
namespace {

struct GenerateArguments {
  std::string run_dir, model, prompt, prompts, output;
  std::vector<std::string> adapters;
  std::string quantization = "nf4", dtype = "auto";
  bool any_base = false;
  GenerateOptions options;
};

/// The run that --model and --adapter, or a run's folder, mean.
Run run_of(const GenerateArguments& arguments) {
  Run run;
  if (!arguments.run_dir.empty()) {
    run = configs::load_config<Run>(arguments.run_dir + "/config.yaml");
    GRAFT_CHECK(run.train.task == "causal_lm", arguments.run_dir, ": a run of ", run.train.task,
                " learns labels, not text; `graft eval ", arguments.run_dir,
                "/config.yaml` measures them");
    run.peft.clear();
    const std::string adapter = arguments.run_dir + "/adapter";
    GRAFT_CHECK(std::filesystem::exists(adapter), arguments.run_dir,
                ": no adapter yet; the run has not finished");
    add_adapter(run.model, adapter);
  } else {
    GRAFT_CHECK(!arguments.model.empty(), "generate: name a run's folder, or --model");
    run.model.name_or_path = arguments.model;
    run.model.quantization = arguments.quantization;
    run.model.dtype = arguments.dtype;
  }
  for (const std::string& adapter : arguments.adapters) add_adapter(run.model, adapter);
  if (arguments.any_base) run.model.any_base = true;
  return run;
}

/// Whether a JSON writer, told to leave out what is not UTF-8, has nothing to leave out.
bool is_utf8(const std::string& text) {
  using nlohmann::json;
  const std::string kept = json(text).dump(-1, ' ', false, json::error_handler_t::ignore);
  return json::parse(kept).get_ref<const std::string&>() == text;
}

std::vector<std::string> prompts_of(const GenerateArguments& arguments) {
  if (arguments.prompts.empty()) {
    GRAFT_CHECK(!arguments.prompt.empty(), "generate: give --prompt TEXT or --prompts FILE");
    GRAFT_CHECK(is_utf8(arguments.prompt), "--prompt: not UTF-8");
    return {arguments.prompt};
  }
  GRAFT_CHECK(!arguments.output.empty(), "generate: --prompts needs --output");
  std::ifstream in(arguments.prompts);
  GRAFT_CHECK(in.good(), ExitCode::kData, arguments.prompts, ": cannot be read");
  std::vector<std::string> prompts;
  int64_t number = 0;
  for (std::string line; std::getline(in, line);) {
    ++number;
    GRAFT_CHECK(is_utf8(line), ExitCode::kData, arguments.prompts, ":", number, ": not UTF-8");
    if (!line.empty()) prompts.push_back(line);
  }
  GRAFT_CHECK(!prompts.empty(), ExitCode::kData, arguments.prompts,
              ": holds no prompt (one a line)");
  return prompts;
}

/// Prints text as it grows. A character may need several tokens: what ends in the replacement mark
/// waits for more. The tokens shown last are decoded again as the context of the new ones.
class Stream {
 public:
  explicit Stream(TokenizerPipe& tokenizer) : tokenizer_(tokenizer) {}
  void operator()(int64_t token) {
    new_.push_back(token);
    std::vector<int64_t> both = shown_;
    both.insert(both.end(), new_.begin(), new_.end());
    const std::string text = tokenizer_.decode(both);
    const size_t known = tokenizer_.decode(shown_).size();
    if (text.ends_with("\xEF\xBF\xBD") || text.size() <= known) return;
    std::fwrite(text.data() + known, 1, text.size() - known, stdout);
    std::fflush(stdout);
    shown_ = std::exchange(new_, {});
  }

 private:
  TokenizerPipe& tokenizer_;
  std::vector<int64_t> shown_, new_;
};

int generate_text(const GenerateArguments& arguments, const dist::Topology& topology,
                  dist::MpiSession* session) {
  GRAFT_CHECK(!std::isnan(arguments.options.temperature), "--temperature: not a number");
  const auto prompts = prompts_of(arguments);
  Run run = run_of(arguments);
  World world = join_world(topology, session, run.parallel);
  TokenizerPipe tokenizer(run.model.name_or_path);
  std::vector<std::vector<int64_t>> rendered;  // before the base: what fails here fails at once
  for (const std::string& prompt : prompts) rendered.push_back(tokenizer.render(prompt));
  Workbench bench = build_workbench(world, run);
  GenerateOptions options = arguments.options;
  options.eos_ids = tokenizer.eos_ids();
  const bool visible = arguments.output.empty() && world.rank() == 0;
  std::string lines;
  for (size_t i = 0; i < prompts.size(); ++i) {
    std::function<void(int64_t)> on_token = [](int64_t) {};
    if (visible) on_token = Stream(tokenizer);
    options.prompt_number = static_cast<int64_t>(i);
    const auto ids = generate(bench, rendered[i], options, on_token);
    lines +=
        nlohmann::ordered_json{
            {"prompt", prompts[i]}, {"text", tokenizer.decode(ids)}, {"tokens", ids.size()}}
            .dump() +
        "\n";
  }
  if (world.rank() != 0) return 0;
  if (arguments.output.empty()) {
    std::printf("\n");
  } else {
    write_text(arguments.output, lines);
  }
  return 0;
}

}  // namespace

void add_generate(CLI::App& app, Command& command) {
  auto* verb = app.add_subcommand("generate", "Text from a base with adapters");
  auto arguments = std::make_shared<GenerateArguments>();
  auto* run = verb->add_option("RUN_DIR", arguments->run_dir,
                               "a finished run: its base, settings and adapter");
  verb->add_option("--model", arguments->model, "Hugging Face folder or GGUF file")->excludes(run);
  verb->add_option("--adapter", arguments->adapters,
                   "adapter folder, or FOLDER=WEIGHT; for several repeat --adapter")
      ->allow_extra_args(false);
  verb->add_flag("--any-base", arguments->any_base, kAnyBase);
  verb->add_option("--prompt", arguments->prompt,
                   "a user's message; goes through the model's chat template");
  verb->add_option("--prompts", arguments->prompts, "a file with a prompt a line");
  verb->add_option("--output", arguments->output,
                   "where to write JSON lines instead of the terminal");
  verb->add_option("--max-new-tokens", arguments->options.max_new_tokens)
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  verb->add_option("--temperature", arguments->options.temperature, "0: always the likeliest token")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  verb->add_option("--seed", arguments->options.seed)->capture_default_str();
  verb->add_option("--quantization", arguments->quantization, "of the base")
      ->check(CLI::IsMember({"none", "nf4", "fp4", "int8"}))
      ->capture_default_str();
  verb->add_option("--dtype", arguments->dtype, "compute type")
      ->check(CLI::IsMember({"auto", "float32", "bfloat16"}))
      ->capture_default_str();
  verb->footer(
      "Examples:\n  graft generate --model models/smollm2-135m-instruct.gguf --prompt 'What is "
      "gravity?'\n"
      "  graft generate runs/quickstart --prompt 'def sorted(iterable)' --max-new-tokens 40");
  verb->callback([arguments, &command] {
    command.run_on_ranks = [arguments](const dist::Topology& topology, dist::MpiSession* session) {
      return generate_text(*arguments, topology, session);
    };
  });
}

}  // namespace graft::launcher
