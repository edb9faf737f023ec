// Trainer: owns what a run trains with and spells the step.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>

#include "data/loader.h"
#include "launcher/gradients.h"
#include "launcher/optim/rules.h"
#include "launcher/optim/schedule.h"
#include "launcher/workbench.h"

namespace graft::launcher {

struct StepResult {
  double loss = 0;       ///< mean over the step's target tokens, all ranks
  double grad_norm = 0;  ///< before clipping
  double learning_rate = 0;
  int64_t tokens = 0;  ///< tokens of the step that are not padding, all ranks
  int64_t targets = 0;
  double epoch = 0;
  double step_ms = 0, data_wait_ms = 0;
  int64_t bytes_gathered = 0, bytes_reduced = 0;  ///< received by this rank
  bool skipped = false;         ///< no target in the step, or gradients that are not finite
  bool stop_requested = false;  ///< some rank was asked to end
};

/// Everything beside the adapters that decides how a run goes on.
struct TrainState {
  int64_t step = 0;  ///< optimiser steps done
  data::Cursor cursor;
  int64_t tokens = 0;  ///< seen so far
  int64_t non_finite_in_a_row = 0;
  double best_eval_loss = 0;
  int64_t best_step = -1;  ///< of best_eval_loss; -1: none yet
};

class Trainer {
 public:
  /// Opens the data. Collective.
  Trainer(Workbench& bench, const Run& run);

  /// @param stop_requested  this rank was asked to end; agreed with the others inside the step
  StepResult train_step(bool stop_requested);

  int64_t max_steps() const { return schedule_.max_steps; }
  int64_t num_lanes() const { return num_lanes_; }
  /// Lanes of this rank that share one gather of each block: parallel.lanes_per_gather.
  int64_t lanes_per_gather() const { return lanes_per_gather_; }
  TrainState& state() { return state_; }
  StepRule& optimizer() { return *optimizer_; }
  data::Loader& loader() { return loader_; }
  /// Continues after `state`: the data position follows it.
  void restore(const TrainState& state);
  const nlohmann::json& inputs() const { return inputs_; }  ///< input_facts when the run began

 private:
  struct Sums {
    double loss = 0, targets = 0, tokens = 0;
    bool stop = false, bad_samples = false;
  };
  models::Recompute recompute() const;
  std::vector<models::Lane> next_lanes();
  Sums sum_over_ranks(const std::vector<models::Lane>& lanes, bool stop_requested);
  void agree_on_bad_samples();
  bool finite(double loss, double grad_norm, std::span<const models::Lane> lanes);
  std::string what_is_not_finite(std::span<const models::Lane> lanes);
  models::TrunkOptions trunk_options() const;
  StepResult update(const Sums& sums, std::span<const models::Lane> lanes);

  Workbench& bench_;
  const Run& run_;
  int64_t num_lanes_, lanes_per_gather_;
  data::Loader loader_;
  nlohmann::json inputs_;
  Gradients gradients_;
  std::unique_ptr<StepRule> optimizer_;
  Schedule schedule_;
  TrainState state_;
  int64_t first_step_ = 0, targets_ = 0;      ///< of this process: where it began, targets it met
  std::vector<data::BadSample> bad_samples_;  ///< met by this rank in this step
};

/// How the files, rows and lanes of a run become a loader's configuration.
data::LoaderConfig train_loader_config(const Run& run, const World& world);

/// The optimiser of train.optim. Its state is allocated.
std::unique_ptr<StepRule> step_rule_of(const TrainConfig& train, const peft::ParamSet& params);

Schedule schedule_of(const Run& run, const data::Loader& loader);

/// Warns of rows beyond the model's positions, and of a micro-batch that will not fit.
void warn_of_size(const Run& run, const World& world, const models::ModelInfo& model,
                  at::ScalarType dtype);

/// A batch on its way, on `device`; the numbers of its documents stay on the host.
models::Lane make_lane(data::Batch batch, int64_t number, at::Device device);

/// @throws graft::Error (kData) if a shard was made with a larger vocabulary than the model's
void check_vocabulary(const data::Corpus& corpus, const models::ModelInfo& model);

}  // namespace graft::launcher
