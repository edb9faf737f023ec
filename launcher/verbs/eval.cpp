// graft eval: held-out metrics of the base, an adapter or a run.
#include <nlohmann/json.hpp>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <iomanip>
#include <system_error>

#include "configs/check.h"
#include "configs/log.h"
#include "configs/names.h"
#include "data/loader.h"
#include "launcher/checkpoint/manifest.h"
#include "launcher/evaluate.h"
#include "launcher/facts.h"
#include "launcher/task.h"
#include "launcher/trainer.h"
#include "launcher/verbs/verbs.h"
#include "models/base.h"
#include "models/io/byte_sink.h"
#include "peft/adapter_file.h"

namespace graft::launcher {
namespace {

struct EvalArguments {
  RunArguments run;
  std::string logits, output;
  std::vector<std::string> adapters;
  bool base = false, json = false;
};

/// --adapter, else the run's own adapter, else the config's start; `said` tells which.
void choose_adapter(const EvalArguments& arguments, Run& run, std::string& said) {
  const std::string trained = run.checkpoint.output_dir + "/adapter";
  std::vector<std::string> chosen = arguments.adapters;
  if (chosen.empty() && std::filesystem::exists(trained)) chosen = {trained};
  if (arguments.base) {
    run.peft.clear();
    run.model.adapters = {};
    run.model.adapter_weights = {};
    run.model.active_adapters = std::nullopt;
    said = "the untouched base";
    return;
  }
  if (chosen.empty()) {
    said =
        run.peft.empty() ? "the base" : "the config's start (" + trained + " does not exist yet)";
    return;
  }
  run.peft.clear();
  for (const std::string& adapter : chosen) add_adapter(run.model, adapter);
  said = "adapter " + configs::join(chosen, " + ");
}

bool is_or_holds(const std::string& input, const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code none;  // what is not there is no other file
  return fs::equivalent(input, path, none) ||
         (fs::is_directory(input, none) &&
          fs::equivalent(input, fs::absolute(path).parent_path(), none));
}

/// What is measured is not overwritten; said before the work, as is what cannot be written.
void check_outputs(const EvalArguments& arguments, const Run& run, const data::Corpus& rows) {
  std::vector<std::string> inputs = run.model.adapters.values;
  inputs.insert(inputs.end(), {arguments.run.config, run.model.name_or_path});
  for (const data::TokenShard& shard : rows.shards()) inputs.push_back(shard.path());
  for (const peft::MethodEntry& entry : run.peft) inputs.push_back(entry.init_from.value_or(""));
  for (const std::string& output : {arguments.logits, arguments.output}) {
    if (output.empty()) continue;
    models::io::check_replaceable(output);
    for (const std::string& input : inputs) {
      GRAFT_CHECK(!is_or_holds(input, output), "eval: ", output,
                  " would overwrite what is measured, or lie in its folder: ", input,
                  "; choose another file");
    }
  }
}

/// Loading a large base takes minutes: what is wrong with the data is told before.
void check_eval_data(const EvalArguments& arguments, const Run& run) {
  GRAFT_CHECK(!run.data.eval.values.empty(), arguments.run.config,
              ": data.eval names no shards to evaluate on");
  const data::Corpus rows(run.data.eval.values);
  check_outputs(arguments, run, rows);
  const auto model = models::make_model(base_config(run, labels_of(run).size()));
  check_vocabulary(rows, model->info());
}

/// Another order of the labels would give every document another's.
void check_labels(const Workbench& bench, const Run& run) {
  for (const std::string& directory : run.model.adapters.values) {
    const auto facts = peft::AdapterFile(directory).facts();
    const auto labels = facts.value("labels", std::vector<std::string>());
    GRAFT_CHECK(labels.empty() || labels == bench.labels, ExitCode::kData, directory,
                ": was trained for the labels ", configs::join(labels, ", "), ", data.eval has ",
                configs::join(bench.labels, ", "));
  }
}

void write_record(const std::string& path, const nlohmann::ordered_json& record) {
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  if (!folder.empty()) std::filesystem::create_directories(folder);
  write_text(path, record.dump(2, ' ', false, Facts::error_handler_t::replace) + "\n");
}

int eval(const EvalArguments& arguments, const dist::Topology& topology,
         dist::MpiSession* session) {
  auto run = configs::load_config<Run>(arguments.run.config, arguments.run.overrides);
  World world = join_world(topology, session, run.parallel);
  std::string what;
  choose_adapter(arguments, run, what);
  run.data.train = {};  // the labels are those of data.eval
  check_eval_data(arguments, run);
  Workbench bench = build_workbench(world, run);
  check_labels(bench, run);
  log::info("evaluating " + what);
  if (!arguments.logits.empty()) write_logits(bench, run, arguments.logits);
  const EvalResult result = evaluate(bench, run);
  GRAFT_CHECK(std::isfinite(result.loss), ExitCode::kNumerics, "the held-out loss of ", what,
              " is ", result.loss,
              ": these weights compute numbers that are not finite; try model.dtype=float32, and "
              "look at them with `graft inspect`");
  if (world.rank() != 0) return 0;
  nlohmann::ordered_json record = {{"what", what},
                                   {"metrics", {{"loss", result.loss}}},
                                   {"target_tokens", result.targets},
                                   {"documents", result.documents},
                                   {"base_fingerprint", bench.fingerprint}};
  if (run.eval.wants("accuracy")) record["metrics"]["accuracy"] = result.accuracy();
  write_record(
      arguments.output.empty() ? run.checkpoint.output_dir + "/eval.json" : arguments.output,
      record);
  if (arguments.json) {
    std::fputs(facts_json(record).c_str(), stdout);
  } else {
    const std::string more =
        run.eval.wants("accuracy")
            ? detail::concat(std::fixed, std::setprecision(4), "   accuracy ", result.accuracy())
            : "";
    std::printf("loss %.4f%s   (%lld target tokens in %lld documents, %s)\n", result.loss,
                more.c_str(), static_cast<long long>(result.targets),
                static_cast<long long>(result.documents), what.c_str());
  }
  return 0;
}

}  // namespace

void add_eval(CLI::App& app, Command& command) {
  auto* verb = app.add_subcommand("eval", "Held-out loss of the base, an adapter or a run");
  auto arguments = std::make_shared<EvalArguments>();
  add_run_arguments(*verb, arguments->run);
  auto* adapter =
      verb->add_option("--adapter", arguments->adapters,
                       "adapter folder, or FOLDER=WEIGHT; for several repeat --adapter; default: "
                       "output_dir/adapter, else the config's own start")
          ->allow_extra_args(false);
  verb->add_flag("--base", arguments->base, "the base without any adapter")->excludes(adapter);
  verb->add_option("--logits", arguments->logits,
                   "also write the logits of each eval row (safetensors, float32)");
  verb->add_option("--output", arguments->output,
                   "file for what was measured (JSON); default: output_dir/eval.json");
  verb->add_flag("--json", arguments->json, "one JSON object on standard output");
  verb->footer(
      "Examples:\n  graft eval configs/runs/quickstart.yaml\n"
      "  graft eval configs/runs/quickstart.yaml --base --output runs/quickstart/before.json");
  verb->callback([arguments, &command] {
    command.run_on_ranks = [arguments](const dist::Topology& topology, dist::MpiSession* session) {
      return eval(*arguments, topology, session);
    };
  });
}

}  // namespace graft::launcher
