// graft train: one task from config to adapter.
#include <nlohmann/json.hpp>

#include <csignal>
#include <filesystem>

#include "configs/check.h"
#include "configs/log.h"
#include "data/loader.h"
#include "launcher/checkpoint/checkpoint.h"
#include "launcher/checkpoint/manifest.h"
#include "launcher/evaluate.h"
#include "launcher/metrics.h"
#include "launcher/run_record.h"
#include "launcher/trainer.h"
#include "launcher/verbs/verbs.h"

namespace graft::launcher {
namespace {

volatile std::sig_atomic_t stop_signal = 0;  // the only thing a handler may touch

void watch_signals() {
  for (const int signal : {SIGUSR1, SIGUSR2, SIGTERM}) {
    std::signal(signal, [](int number) { stop_signal = number; });
  }
}

struct Arguments {
  RunArguments run;
  std::string resume = "auto";
};

/// Where to go on, after --resume. A checkpoint that newer ones of the same folder follow is
/// refused: two histories in one folder cannot be told apart later.
std::optional<std::string> checkpoint_to_resume(const std::string& resume,
                                                const std::string& output_dir, World& world) {
  auto newest = find_checkpoint(output_dir, world);
  if (resume == "auto") return newest;
  GRAFT_CHECK(
      resume != "never" || !newest, "--resume never: ", output_dir, " holds a run already (",
      newest.value_or(""),
      "). Use --resume auto to continue it, another checkpoint.output_dir, or remove the folder.");
  if (resume == "never") return std::nullopt;
  namespace fs = std::filesystem;
  GRAFT_CHECK(fs::exists(resume), "--resume: ", resume, " does not exist");
  GRAFT_CHECK(!newest || fs::equivalent(resume, *newest), "--resume ", resume, ": ", output_dir,
              " goes on to ", newest.value_or(""),
              "; to branch off, choose another checkpoint.output_dir");
  return resume;
}

class TrainLoop {
 public:
  TrainLoop(Workbench& bench, Trainer& trainer, const Run& run)
      : bench_(bench),
        trainer_(trainer),
        run_(run),
        metrics_(run.checkpoint.output_dir, trainer.state().step, bench) {}

  /// @return false if the run was asked to stop before its end
  bool run() {
    while (trainer_.state().step < trainer_.max_steps()) {
      const StepResult result = trainer_.train_step(stop_signal != 0);
      const int64_t step = trainer_.state().step;
      std::optional<double> eval_loss;
      if (run_.eval.eval_steps > 0 && step % run_.eval.eval_steps == 0) eval_loss = measure();
      metrics_.step(result, trainer_, eval_loss, run_.log.logging_steps);
      const bool last = step == trainer_.max_steps();
      if (last || result.stop_requested ||
          (run_.checkpoint.save_steps > 0 && step % run_.checkpoint.save_steps == 0))
        save();
      if (result.stop_requested && !last) return false;
    }
    metrics_.finish();
    return true;
  }

 private:
  void save() {
    if (saved_step_ == trainer_.state().step) return;
    save_checkpoint(run_.checkpoint.output_dir, bench_, trainer_, run_);
    saved_step_ = trainer_.state().step;
  }
  double measure() {
    const double loss = evaluate(bench_, run_).loss;
    TrainState& state = trainer_.state();
    if (state.best_step < 0 || loss < state.best_eval_loss) {
      state.best_eval_loss = loss;
      state.best_step = state.step;
      if (run_.eval.load_best_model_at_end) save();
    }
    return loss;
  }

  Workbench& bench_;
  Trainer& trainer_;
  const Run& run_;
  Metrics metrics_;
  int64_t saved_step_ = -1;
};

int train(const Arguments& arguments, const dist::Topology& topology, dist::MpiSession* session) {
  auto run = configs::load_config<Run>(arguments.run.config, arguments.run.overrides);
  GRAFT_CHECK(!run.data.train.values.empty(), arguments.run.config,
              ": data.train names no shards to train on");
  World world = join_world(topology, session, run.parallel);
  const std::string output_dir = run.checkpoint.output_dir;
  const OutputDirectory output(output_dir, world);
  dist::agree(*world.host, true);
  log::init({world.rank(), world.size(), log_file(output_dir, world.rank()), false});
  const auto checkpoint = checkpoint_to_resume(arguments.resume, output_dir, world);
  const data::Corpus early_look(
      run.data.train.values);  // a missing shard is better met before the model is loaded

  Workbench bench = build_workbench(world, run);
  GRAFT_CHECK(bench.adapters->params().numel() > 0, "peft: nothing to train");
  const std::string base_hash = bench.store->hash();
  Trainer trainer(bench, run);
  if (checkpoint) {
    load_checkpoint(*checkpoint, bench, trainer, run);
    log::info("resumed from " + *checkpoint);
    if (trainer.state().step >= trainer.max_steps()) {
      log::info(
          "this run has finished already: nothing is left to train; a larger train.max_steps goes "
          "on");
    }
  }
  if (world.rank() == 0) {
    write_text(output_dir + "/config.yaml", configs::dump(run));
    write_text(output_dir + "/run.json", run_record(bench, run).dump(2) + "\n");
  }
  log::info(banner(bench, trainer, run));
  const bool finished = TrainLoop(bench, trainer, run).run();
  GRAFT_CHECK(bench.store->hash() == base_hash, ExitCode::kNumerics,
              "the frozen base changed during the run: its adapter must not be trusted (a bug, or "
              "broken memory)");
  if (!finished) {
    log::info("stopped at step " + std::to_string(trainer.state().step) +
              " as asked; run the same command to continue");
    return static_cast<int>(ExitCode::kPreempted);
  }
  if (run.eval.load_best_model_at_end && trainer.state().best_step >= 0) {
    bench.adapters->load(checkpoint_path(output_dir, trainer.state().best_step));
  }
  if (world.rank() == 0) save_adapter(output_dir + "/adapter", bench, run);
  log::info("adapter: " + output_dir + "/adapter");
  return 0;
}

}  // namespace

void add_train(CLI::App& app, Command& command) {
  auto* verb = app.add_subcommand("train", "Train adapters on a frozen base");
  auto arguments = std::make_shared<Arguments>();
  add_run_arguments(*verb, arguments->run);
  verb->add_option("--resume", arguments->resume,
                   "auto: the newest good checkpoint | never | a checkpoint's path")
      ->capture_default_str();
  verb->footer(
      "Examples:\n  mpirun -np 2 graft train configs/runs/quickstart.yaml\n"
      "  graft train run.yaml train.learning_rate=1e-4 checkpoint.output_dir=runs/second");
  verb->callback([arguments, &command] {
    watch_signals();  // before the ranks meet: a run that is preempted while it loads still ends
                      // with a checkpoint
    command.run_on_ranks = [arguments](const dist::Topology& topology, dist::MpiSession* session) {
      return train(*arguments, topology, session);
    };
  });
}

}  // namespace graft::launcher
