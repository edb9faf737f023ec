#include "launcher/trainer.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <span>
#include <sstream>

#include "configs/check.h"
#include "configs/log.h"
#include "kernels/adamw/adamw.h"
#include "launcher/inputs.h"
#include "launcher/plan/memory.h"
#include "launcher/progress.h"
#include "launcher/task.h"

namespace graft::launcher {
namespace {

constexpr int64_t kMostNonFinite = 3;

Reduction reduction_of(const std::string& name, at::Device device) {
  return name == "tree" || (name == "auto" && device.is_cpu()) ? Reduction::kTree
                                                               : Reduction::kFastest;
}

int64_t steps_of_epochs(const data::Loader& loader, double epochs) {
  double steps = 0;
  for (int64_t epoch = 0; static_cast<double>(epoch) < epochs; ++epoch) {
    const double share = std::min(1.0, epochs - static_cast<double>(epoch));
    steps += share * static_cast<double>(loader.steps_in_epoch(epoch));
  }
  return std::max<int64_t>(1, std::llround(std::ceil(steps)));
}

/// `auto` is decided once, on all ranks alike: they make the same gathers.
int64_t lanes_per_gather_of(const Run& run, const Workbench& bench, models::Recompute recompute) {
  const int64_t lanes = run.train.gradient_accumulation_steps;
  if (bench.adapters->params().has_thawed()) {
    GRAFT_CHECK(
        !run.parallel.lanes_per_gather.value || *run.parallel.lanes_per_gather.value >= lanes,
        "parallel.lanes_per_gather = ", *run.parallel.lanes_per_gather.value,
        ": thawed weights take all ", lanes,
        " micro-batches of a step in one gather (auto), "
        "so that each block's gradients leave once");
    return lanes;
  }
  if (run.parallel.lanes_per_gather.value)
    return std::min<int64_t>(lanes, *run.parallel.lanes_per_gather.value);
  const int64_t tokens = int64_t{run.train.per_device_train_batch_size} * run.data.max_length;
  return lanes_that_fit(bench.world, lanes,
                        lane_bytes(bench.model->info(), tokens, recompute, bench.dtype));
}

}  // namespace

std::unique_ptr<StepRule> step_rule_of(const TrainConfig& train, const peft::ParamSet& params) {
  return make_step_rule(train.optim, params,
                        {train.weight_decay, train.adam_beta1, train.adam_beta2, train.adam_epsilon,
                         train.learning_rate});
}

data::LoaderConfig train_loader_config(const Run& run, const World& world) {
  data::LoaderConfig config;
  config.files = run.data.train.values;
  config.max_length = run.data.max_length;
  config.packing = run.data.packing ? data::Packing::kOn : data::Packing::kOff;
  config.shuffle = run.data.shuffle ? data::Shuffle::kOn : data::Shuffle::kOff;
  config.predict = predicted_by(run);
  config.seed = static_cast<uint64_t>(run.train.seed);
  config.rows_per_lane = run.train.per_device_train_batch_size;
  config.num_local_lanes = run.train.gradient_accumulation_steps;
  config.num_lanes = config.num_local_lanes * world.size();
  config.first_lane = config.num_local_lanes * world.rank();
  config.on_bad_sample =
      run.data.on_bad_sample == "skip" ? data::OnBadSample::kSkip : data::OnBadSample::kStop;
  return config;
}

Schedule schedule_of(const Run& run, const data::Loader& loader) {
  Schedule schedule{run.train.lr_scheduler_type, run.train.learning_rate};
  schedule.max_steps = run.train.max_steps ? *run.train.max_steps
                                           : steps_of_epochs(loader, *run.train.num_train_epochs);
  schedule.warmup_steps = static_cast<int64_t>(
      std::ceil(run.train.warmup_ratio * static_cast<double>(schedule.max_steps)));
  return schedule;
}

void warn_of_size(const Run& run, const World& world, const models::ModelInfo& model,
                  at::ScalarType dtype) {
  if (run.data.max_length > model.max_length) {
    log::warn(detail::concat("data.max_length = ", run.data.max_length, " is beyond the model's ",
                             model.max_length, " positions"));
  }
  const int64_t rows = run.train.per_device_train_batch_size;
  const auto recompute =
      run.train.gradient_checkpointing ? models::Recompute::kOn : models::Recompute::kOff;
  const int64_t needed = lane_bytes(model, rows * run.data.max_length, recompute, dtype);
  const int64_t free = free_memory_bytes(world);
  if (needed <= free) return;
  log::warn("a micro-batch keeps about " + bytes_text(needed) + ", this rank has " +
            bytes_text(free) +
            " free; smaller: data.max_length, train.per_device_train_batch_size, or "
            "train.gradient_checkpointing: true");
}

models::Lane make_lane(data::Batch batch, int64_t number, at::Device device) {
  for (at::Tensor* t : {&batch.tokens_BL, &batch.positions_BL, &batch.labels_BL})
    *t = t->to(device);
  return {std::move(batch), number, 0};
}

void check_vocabulary(const data::Corpus& corpus, const models::ModelInfo& model) {
  for (const auto& shard : corpus.shards()) {
    GRAFT_CHECK(shard.vocab_size() <= model.vocab_size, ExitCode::kData, shard.path(),
                ": tokens of a vocabulary of ", shard.vocab_size(), ", the model has ",
                model.vocab_size, "; prepare the data with this model's tokenizer");
  }
}

Trainer::Trainer(Workbench& bench, const Run& run)
    : bench_(bench),
      run_(run),
      num_lanes_(int64_t{run.train.gradient_accumulation_steps} * bench.world.size()),
      lanes_per_gather_(lanes_per_gather_of(run, bench, recompute())),
      loader_([&] {
        data::LoaderConfig config = train_loader_config(run, bench.world);
        config.report = [this](const data::BadSample& bad) { bad_samples_.push_back(bad); };
        return config;
      }()),
      inputs_(input_facts(run, loader_.corpus())),
      gradients_(bench.adapters->params(), bench.model->num_stages(), num_lanes_,
                 reduction_of(run.parallel.reduction, bench.world.device), &bench.world.comm()),
      optimizer_(step_rule_of(run.train, bench.adapters->params())),
      schedule_(schedule_of(run, loader_)) {
  check_vocabulary(loader_.corpus(), bench.model->info());
  warn_of_size(run, bench.world, bench.model->info(), bench.dtype);
}

models::Recompute Trainer::recompute() const {
  return run_.train.gradient_checkpointing ? models::Recompute::kOn : models::Recompute::kOff;
}

void Trainer::restore(const TrainState& state) {
  state_ = state;
  first_step_ = state.step;
  loader_.seek(state.cursor);
}

std::vector<models::Lane> Trainer::next_lanes() {
  data::Loader::Step step = loader_.next();
  state_.cursor = step.next;
  std::vector<models::Lane> lanes;
  const int64_t first = bench_.world.rank() * static_cast<int64_t>(step.lanes.size());
  for (data::Batch& batch : step.lanes) {
    const int64_t number = first + static_cast<int64_t>(lanes.size());
    lanes.push_back(make_lane(std::move(batch), number, bench_.world.device));
  }
  return lanes;
}

/// Lane by lane in order, so the sum has the same bits at any world size. The wish to stop travels
/// along.
Trainer::Sums Trainer::sum_over_ranks(const std::vector<models::Lane>& lanes, bool stop_requested) {
  const auto count = static_cast<int64_t>(lanes.size());
  const Tensor mine = at::empty({count, 5}, at::kDouble);
  for (int64_t l = 0; l < count; ++l) {
    const models::Lane& lane = lanes[static_cast<size_t>(l)];
    double* row = mine.mutable_data_ptr<double>() + l * 5;
    row[0] = lane.loss_sum;
    row[1] = static_cast<double>(lane.batch.num_targets);
    row[2] = static_cast<double>(lane.batch.num_tokens);
    row[3] = stop_requested ? 1 : 0;
    row[4] = bad_samples_.empty() ? 0 : 1;
  }
  Tensor all = at::empty({num_lanes_, 5}, at::kDouble);
  bench_.world.host->all_gather(mine, all, dist::Traffic::kControl, state_.step)->wait();
  Sums sums;
  for (int64_t l = 0; l < num_lanes_; ++l) {
    const double* row = all.const_data_ptr<double>() + l * 5;
    sums.loss += row[0], sums.targets += row[1], sums.tokens += row[2];
    sums.stop = sums.stop || row[3] != 0;
    sums.bad_samples = sums.bad_samples || row[4] != 0;
  }
  return sums;
}

/// A document that one rank could not read is left out by all from now on: it may be another's in
/// the next epoch, or after a resume on other ranks. Rank 0 says so for the job.
void Trainer::agree_on_bad_samples() {
  std::string mine;
  for (const auto& bad : bad_samples_)
    mine += std::to_string(bad.document) + " " + bad.reason + "\n";
  bad_samples_.clear();
  for (const std::string& text : dist::gather_texts(*bench_.world.host, mine)) {
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
      const size_t space = line.find(' ');
      loader_.skip(std::stoll(line.substr(0, space)));
      log::warn("skipping" + line.substr(space));
    }
  }
}

models::TrunkOptions Trainer::trunk_options() const {
  models::TrunkOptions options;
  options.recompute = recompute();
  options.random = kernels::derive({static_cast<uint64_t>(run_.train.seed), 1}, state_.step);
  options.lowest_trained = bench_.adapters->params().lowest_stage();
  return options;
}

/// The first value that is not finite, in the order of the computation: on the way up, which the
/// ranks go once more together, else in a gradient.
std::string Trainer::what_is_not_finite(std::span<const models::Lane> lanes) {
  const auto mine = bench_.trunk->first_non_finite(lanes, trunk_options());
  const std::string text = detail::concat(mine.stage, " ", mine.where);
  std::string where;
  int lowest = std::numeric_limits<int>::max();
  for (const std::string& of_rank : dist::gather_texts(*bench_.world.host, text)) {
    const int stage = std::stoi(of_rank);
    if (stage >= 0 && stage < lowest) lowest = stage, where = of_rank.substr(of_rank.find(' ') + 1);
  }
  if (!where.empty()) return where;
  const std::string bad = gradients_.first_non_finite();
  return bad.empty() ? "the sum of the gradients" : "the gradient of " + bad;
}

/// Three steps in a row without finite gradients end the run; one is left out by all ranks alike.
bool Trainer::finite(double loss, double grad_norm, std::span<const models::Lane> lanes) {
  if (std::isfinite(loss + grad_norm)) {
    state_.non_finite_in_a_row = 0;
    return true;
  }
  const std::string text =
      detail::concat("step ", state_.step + 1, ": the ", std::isfinite(loss) ? "gradient" : "loss",
                     " is not finite; the first value that is not: ", what_is_not_finite(lanes));
  GRAFT_CHECK(++state_.non_finite_in_a_row < kMostNonFinite, ExitCode::kNumerics, text, "; ",
              kMostNonFinite,
              " steps in a row; lower train.learning_rate or look at the data. The last checkpoint "
              "is untouched.");
  log::warn(text + "; the step is left out");
  return false;
}

StepResult Trainer::train_step(bool stop_requested) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  const dist::Comm& comm = bench_.world.comm();
  const int64_t gathered = comm.bytes(dist::Traffic::kGathered);
  const int64_t reduced = comm.bytes(dist::Traffic::kReduced);

  std::vector<models::Lane> lanes = next_lanes();
  const models::TrunkOptions options = trunk_options();
  const auto per_sweep = static_cast<size_t>(lanes_per_gather_);
  for (size_t first = 0; first < lanes.size(); first += per_sweep) {
    const std::span sweep =
        std::span(lanes).subspan(first, std::min(per_sweep, lanes.size() - first));
    bench_.trunk->sweep(sweep, gradients_, options);
  }
  const Sums sums = sum_over_ranks(lanes, stop_requested);
  if (sums.bad_samples) agree_on_bad_samples();
  gradients_.reduce(bench_.world.comm(), std::max(1.0, sums.targets));

  StepResult result = update(sums, lanes);
  targets_ += result.targets;
  GRAFT_CHECK(
      targets_ > 0 || first_step_ > 0 || state_.step < max_steps(), ExitCode::kData,
      "the run met no target token: none of its documents has one within data.max_length = ",
      run_.data.max_length, "; nothing was learnt");
  result.epoch = loader_.fractional_epoch();
  result.data_wait_ms = loader_.last_wait_ms();
  result.bytes_gathered = comm.bytes(dist::Traffic::kGathered) - gathered;
  result.bytes_reduced = comm.bytes(dist::Traffic::kReduced) - reduced;
  result.step_ms = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
  return result;
}

/// Moves the adapters by the step's gradients, unless there is nothing to learn from.
StepResult Trainer::update(const Sums& sums, std::span<const models::Lane> lanes) {
  const peft::StepInfo info{state_.step, schedule_.max_steps};
  bench_.adapters->after_reduce(info);
  StepResult result;
  result.learning_rate = schedule_(state_.step);
  result.loss = sums.loss / std::max(1.0, sums.targets);
  result.grad_norm = gradients_.norm();
  result.tokens = static_cast<int64_t>(sums.tokens);
  result.targets = static_cast<int64_t>(sums.targets);
  result.stop_requested = sums.stop;
  const bool usable = sums.targets > 0 && finite(result.loss, result.grad_norm, lanes);
  if (usable) {
    const double limit = run_.train.max_grad_norm;
    if (limit > 0 && result.grad_norm > limit) gradients_.scale(limit / (result.grad_norm + 1e-6));
    optimizer_->step(gradients_.of(), result.learning_rate);
    bench_.adapters->after_step(info);
  }
  result.skipped = !usable;
  ++state_.step;
  state_.tokens += result.tokens;
  return result;
}

}  // namespace graft::launcher
