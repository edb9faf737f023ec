#include "launcher/evaluate.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <span>

#include "configs/check.h"
#include "configs/log.h"
#include "data/loader.h"
#include "launcher/progress.h"
#include "launcher/task.h"
#include "launcher/trainer.h"
#include "models/io/safetensors.h"

namespace graft::launcher {
namespace {

// A step of evaluation has the same lanes at any world size up to this, so the loss has the same
// bits.
constexpr int64_t kLanes = 16;
constexpr size_t kLanesPerGather = 2;

int64_t lanes_a_rank(const World& world) { return (kLanes + world.size() - 1) / world.size(); }

data::LoaderConfig eval_loader_config(const Run& run, const World& world) {
  GRAFT_CHECK(!run.data.eval.values.empty(), "data.eval names no shards to evaluate on");
  data::LoaderConfig config;
  config.files = run.data.eval.values;
  config.max_length = run.data.max_length;
  config.packing = run.data.packing ? data::Packing::kOn : data::Packing::kOff;
  config.shuffle = data::Shuffle::kOff;
  config.predict = predicted_by(run);
  config.rows_per_lane = run.eval.per_device_eval_batch_size;
  config.num_lanes = std::max<int64_t>(kLanes, world.size());
  config.first_lane = std::min(config.num_lanes, lanes_a_rank(world) * world.rank());
  config.num_local_lanes = std::min(lanes_a_rank(world), config.num_lanes - config.first_lane);
  config.on_bad_sample =
      run.data.on_bad_sample == "skip" ? data::OnBadSample::kSkip : data::OnBadSample::kStop;
  config.report = [](const data::BadSample& bad) { log::warn("skipping " + bad.reason); };
  config.max_samples = run.eval.max_samples.value_or(0);
  config.num_epochs = 1;
  return config;
}

std::vector<models::Lane> lanes_of(data::Loader::Step step, int64_t first, at::Device device) {
  std::vector<models::Lane> lanes;
  for (data::Batch& batch : step.lanes) {
    const int64_t number = first + static_cast<int64_t>(lanes.size());
    lanes.push_back(make_lane(std::move(batch), number, device));
  }
  return lanes;
}

/// Loss, targets and hits of this rank's lanes of a step, [lanes_a_rank, 3] float64. Every rank
/// makes the same gathers, whether or not it has rows.
at::Tensor forward(Workbench& bench, std::vector<models::Lane> lanes, const models::Pass& pass) {
  const int64_t count = lanes_a_rank(bench.world);
  lanes.resize(static_cast<size_t>(count));
  at::Tensor sums = at::zeros({count, 3}, at::kDouble);
  int64_t l = 0;
  for (size_t first = 0; first < lanes.size(); first += kLanesPerGather) {
    const std::span group =
        std::span(lanes).subspan(first, std::min(kLanesPerGather, lanes.size() - first));
    for (const at::Tensor& sum : bench.trunk->forward(group, pass)) {
      sums[l][1] = lanes[static_cast<size_t>(l)].batch.num_targets;
      if (sum.defined()) sums[l][0] = sum.flatten()[0];
      if (sum.defined() && pass.want == models::Want::kLossAndHits) sums[l][2] = sum[1];
      ++l;
    }
  }
  return sums;
}

}  // namespace

EvalResult evaluate(Workbench& bench, const Run& run, Adapters adapters) {
  const data::LoaderConfig config = eval_loader_config(run, bench.world);
  data::Loader loader(config);
  check_vocabulary(loader.corpus(), bench.model->info());
  models::Pass pass;
  pass.adapters = adapters == Adapters::kOn;
  if (run.eval.wants("accuracy")) pass.want = models::Want::kLossAndHits;
  Progress progress("evaluating");
  // Every rank lays out the same steps, so all leave this loop together.
  EvalResult result;
  double loss = 0;
  for (bool last = false; !last;) {
    data::Loader::Step step = loader.next();
    last = step.last_of_epoch;
    const at::Tensor mine =
        forward(bench, lanes_of(std::move(step), config.first_lane, bench.world.device), pass);
    at::Tensor all = at::empty({mine.size(0) * bench.world.size(), 3}, at::kDouble);
    bench.world.host->all_gather(mine, all, dist::Traffic::kControl, 0)->wait();
    for (int64_t l = 0; l < all.size(0); ++l) {
      loss += all[l][0].item<double>();
      result.targets += static_cast<int64_t>(all[l][1].item<double>());
      result.hits += static_cast<int64_t>(all[l][2].item<double>());
    }
    progress.update(last ? loader.num_documents() : loader.cursor().position,
                    loader.num_documents());
  }
  progress.finish();
  GRAFT_CHECK(result.targets > 0, ExitCode::kData,
              "data.eval holds no target token within data.max_length = ", run.data.max_length);
  result.loss = loss / static_cast<double>(result.targets);
  result.documents = loader.num_documents();
  return result;
}

void write_logits(Workbench& bench, const Run& run, const std::string& path) {
  GRAFT_CHECK(bench.world.size() == 1, "--logits needs one rank, this job has ",
              bench.world.size());
  data::LoaderConfig config = eval_loader_config(run, bench.world);
  config.rows_per_lane = config.num_lanes = config.num_local_lanes = 1;
  config.packing = data::Packing::kOff;
  data::Loader loader(config);
  check_vocabulary(loader.corpus(), bench.model->info());
  const models::ModelInfo info = bench.model->info();
  const bool is_pooled = info.task == models::Task::kSequenceClassification;
  std::vector<models::io::SafetensorsEntry> entries;
  std::map<std::string, int64_t> rows;
  for (int64_t row = 0; row < loader.num_documents(); ++row) {
    const int64_t length =
        is_pooled ? 1 : std::min<int64_t>(loader.corpus().length(row), run.data.max_length);
    const std::string name = "row." + std::to_string(row);
    entries.push_back({name, "F32", {length, info.num_outputs}});
    rows[name] = row;
  }
  models::Pass pass;
  pass.want = models::Want::kLogits;
  const std::string head = models::io::layout_safetensors(entries, {});
  models::io::write_file(path, [&](const models::io::ByteSink& sink) {
    sink(std::as_bytes(std::span(head)));
    for (const auto& entry : entries) {  // in the order of the file; one row in memory at a time
      if (entry.bytes == 0) continue;
      loader.seek({0, rows.at(entry.name)});
      const auto lanes = lanes_of(loader.next(), 0, bench.world.device);
      at::Tensor logits_LV = bench.trunk->forward(lanes, pass).front()[0];
      logits_LV = is_pooled ? logits_LV.index({lanes.front().batch.labels_BL[0].ge(0)})
                            : logits_LV.narrow(0, 0, entry.shape[0]);
      logits_LV = logits_LV.to(at::kFloat).cpu().contiguous();
      sink({static_cast<const std::byte*>(logits_LV.const_data_ptr()), logits_LV.nbytes()});
    }
  });
}

}  // namespace graft::launcher
