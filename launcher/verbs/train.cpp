// graft train: one task from config to adapter.
#include <nlohmann/json.hpp>

#include <cmath>
#include <cstdio>
#include <optional>
#include <string>

#include "configs/check.h"
#include "configs/log.h"
#include "data/loader.h"
#include "launcher/checkpoint/checkpoint.h"
#include "launcher/checkpoint/manifest.h"
#include "launcher/dry_run.h"
#include "launcher/evaluate.h"
#include "launcher/inputs.h"
#include "launcher/metrics.h"
#include "launcher/run_record.h"
#include "launcher/stop_signals.h"
#include "launcher/task.h"
#include "launcher/trainer.h"
#include "launcher/verbs/verbs.h"

namespace graft::launcher {
namespace {

struct Arguments {
  RunArguments run;
  std::string resume = "auto";
  bool dry_run = false;
};

class TrainLoop {
 public:
  TrainLoop(OutputDirectory& output, Workbench& bench, Trainer& trainer, const Run& run)
      : output_(output),
        bench_(bench),
        trainer_(trainer),
        run_(run),
        metrics_(run, trainer.state().step, bench) {}

  /// @return false if the run was asked to stop before its end
  bool run() {
    save_before_stopping();
    while (trainer_.state().step < trainer_.max_steps()) {
      const StepResult result = trainer_.train_step(stop_requested());
      const int64_t step = trainer_.state().step;
      std::optional<EvalResult> evaluation;
      if (run_.eval.eval_steps > 0 && step % run_.eval.eval_steps == 0)
        evaluation = evaluate(bench_, run_);
      metrics_.step(result, trainer_, run_, evaluation);
      const bool last = step == trainer_.max_steps();
      const bool due = run_.checkpoint.save_steps > 0 && step % run_.checkpoint.save_steps == 0;
      const bool best = evaluation && takes_lead(evaluation->loss);
      if (last || due || best || result.stop_requested)
        save_checkpoint(output_, bench_, trainer_, run_);
      if (result.stop_requested && !last) return false;
    }
    metrics_.finish();
    return true;
  }

 private:
  /// Whether this is the best adapter so far and wanted at the end: then it must be saved.
  bool takes_lead(double loss) {
    TrainState& state = trainer_.state();
    const bool best = state.best_step < 0 || loss < state.best_eval_loss;
    if (!run_.eval.load_best_model_at_end || !best || !std::isfinite(loss)) return false;
    state.best_eval_loss = loss;
    state.best_step = state.step;
    return true;
  }

  OutputDirectory& output_;
  Workbench& bench_;
  Trainer& trainer_;
  const Run& run_;
  Metrics metrics_;
};

/// Where to go on, with everything checked that needs no weights: those of a large model take
/// minutes.
std::optional<std::string> look_before_loading(const Arguments& arguments, OutputDirectory& output,
                                               World& world, Run& run) {
  auto checkpoint = checkpoint_to_resume(arguments.resume, output, world, run);
  const data::Corpus corpus(run.data.train.values);
  check_same_inputs(world, run, corpus);
  if (run.eval.eval_steps > 0) check_held_out(run, corpus, data::Corpus(run.data.eval.values));
  if (checkpoint) prepare_resume(*checkpoint, world, run);
  return checkpoint;
}

void resume(const std::string& checkpoint, const OutputDirectory& output, Workbench& bench,
            Trainer& trainer) {
  load_checkpoint(checkpoint, output, bench, trainer);
  log::info("resumed from " + checkpoint);
  if (trainer.state().step >= trainer.max_steps()) {
    log::info(
        "this run has finished already: nothing is left to train; a larger train.max_steps goes "
        "on");
  }
}

void write_run_files(const Workbench& bench, const Run& run) {
  const auto record = run_record(bench, run);
  if (bench.world.rank() != 0) return;
  write_text(run.checkpoint.output_dir + "/config.yaml", configs::dump(run));
  // A command line may hold bytes that are no text.
  write_text(run.checkpoint.output_dir + "/run.json",
             record.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n");
}

/// Leaves output_dir/adapter: the last adapter, or the best.
void finish(const OutputDirectory& output, Workbench& bench, Trainer& trainer, const Run& run) {
  if (run.eval.load_best_model_at_end && trainer.state().best_step >= 0) {
    load_best_adapter(output, bench, trainer);
  } else if (run.eval.load_best_model_at_end) {
    log::warn(
        "eval.load_best_model_at_end: no evaluation gave a finite loss; the adapter is that of the "
        "last step");
  }
  save_adapter(output, bench, run);
  log::info("adapter: " + output.adapter_path());
}

int train(const Arguments& arguments, const dist::Topology& topology, dist::MpiSession* session) {
  const auto load = arguments.dry_run ? load_checked_run : load_run;
  Run run = load(arguments.run.config, arguments.run.overrides);
  GRAFT_CHECK(!run.data.train.values.empty(), arguments.run.config,
              ": data.train names no shards to train on");
  World world = join_world(topology, session, run.parallel);
  if (arguments.dry_run) {
    if (world.rank() == 0) std::printf("%s\n", dry_run(run, world).c_str());
    return static_cast<int>(ExitCode::kDone);
  }
  OutputDirectory output(run.checkpoint.output_dir, world);
  dist::agree(*world.host, true);  // the folder is ours before any rank writes into it
  const auto checkpoint = look_before_loading(arguments, output, world, run);

  Workbench bench = build_workbench(world, run, checkpoint.value_or(""));
  GRAFT_CHECK(bench.adapters->params().numel() > 0, "peft: nothing to train");
  const std::string base_hash = bench.store->hash();
  const std::string frozen_hash = bench.adapters->frozen_hash();
  Trainer trainer(bench, run);
  if (checkpoint) resume(*checkpoint, output, bench, trainer);
  output.keep();  // a start that failed has left nothing
  log::add_file(log_file(output.path(), world.rank()));
  write_run_files(bench, run);
  log::info(banner(bench, trainer, run));
  const bool finished = TrainLoop(output, bench, trainer, run).run();
  GRAFT_CHECK(bench.store->hash() == base_hash, ExitCode::kNumerics,
              "the frozen base changed during the run: its adapter must not be trusted (a bug, or "
              "broken memory)");
  GRAFT_CHECK(bench.adapters->frozen_hash() == frozen_hash, ExitCode::kNumerics,
              "a frozen adapter changed during the run: what was trained on it must not be trusted "
              "(a bug, or broken memory)");
  if (finished) {
    finish(output, bench, trainer, run);
    return static_cast<int>(ExitCode::kDone);
  }
  log::info("stopped at step " + std::to_string(trainer.state().step) +
            " as asked; run the same command to continue");
  return static_cast<int>(ExitCode::kPreempted);
}

}  // namespace

void add_train(CLI::App& app, Command& command) {
  auto* verb = app.add_subcommand("train", "Train adapters on a frozen base");
  auto arguments = std::make_shared<Arguments>();
  add_run_arguments(*verb, arguments->run);
  verb->add_option("--resume", arguments->resume,
                   "auto: the newest good checkpoint | never | a checkpoint's path")
      ->capture_default_str();
  verb->add_flag("--dry-run", arguments->dry_run,
                 "only show what would be trained, and two samples with their targets marked");
  verb->footer(
      "Examples:\n  cluster/mpirun.sh -np 2 build/release/graft train "
      "configs/runs/quickstart.yaml\n"
      "  graft train run.yaml train.learning_rate=1e-4 checkpoint.output_dir=runs/second");
  verb->callback([arguments, &command] {
    watch_stop_signals();  // before the ranks meet: a run that is preempted while it loads still
                           // ends with a checkpoint
    command.run_on_ranks = [arguments](const dist::Topology& topology, dist::MpiSession* session) {
      return train(*arguments, topology, session);
    };
  });
}

}  // namespace graft::launcher
