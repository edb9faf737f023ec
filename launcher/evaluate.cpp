#include "launcher/evaluate.h"

#include <ATen/ATen.h>

#include "configs/check.h"
#include "data/loader.h"
#include "launcher/progress.h"
#include "models/io/safetensors.h"

namespace graft::launcher {
namespace {

constexpr int64_t kLanesPerRank = 2;  // lanes that share one gather of each block

data::LoaderConfig eval_loader_config(const Run& run, const World& world) {
  GRAFT_CHECK(!run.data.eval.values.empty(), "data.eval names no shards to evaluate on");
  data::LoaderConfig config;
  config.files = run.data.eval.values;
  config.max_length = run.data.max_length;
  config.packing = run.data.packing ? data::Packing::kOn : data::Packing::kOff;
  config.shuffle = data::Shuffle::kOff;
  config.rows_per_lane = run.eval.per_device_eval_batch_size;
  config.num_local_lanes = kLanesPerRank;
  config.num_lanes = kLanesPerRank * world.size();
  config.first_lane = kLanesPerRank * world.rank();
  config.max_samples = run.eval.max_samples.value_or(0);
  config.num_epochs = 1;
  return config;
}

std::vector<models::Lane> lanes_of(data::Loader::Step step, int64_t first, at::Device device) {
  std::vector<models::Lane> lanes;
  for (data::Batch& batch : step.lanes) {
    for (at::Tensor* t : {&batch.tokens_BL, &batch.positions_BL, &batch.labels_BL})
      *t = t->to(device);
    lanes.push_back({std::move(batch), first + static_cast<int64_t>(lanes.size()), 0});
  }
  return lanes;
}

}  // namespace

EvalResult evaluate(Workbench& bench, const Run& run, Adapters adapters) {
  data::Loader loader(eval_loader_config(run, bench.world));
  models::Pass pass;
  pass.adapters = adapters == Adapters::kOn;
  Progress progress("evaluating");
  // Every rank lays out the same steps, so all leave this loop together, whether or not they have
  // rows of the last one.
  EvalResult result;
  double loss = 0;
  for (bool last = false; !last;) {
    data::Loader::Step step = loader.next();
    last = step.last_of_epoch;
    const auto lanes =
        lanes_of(std::move(step), bench.world.rank() * kLanesPerRank, bench.world.device);
    const auto sums = bench.trunk->forward(lanes, pass);
    const at::Tensor mine = at::zeros({kLanesPerRank, 2}, at::kDouble);
    for (size_t l = 0; l < lanes.size(); ++l) {
      double* row = mine.mutable_data_ptr<double>() + 2 * l;
      row[0] = sums[l].defined() ? sums[l].item<double>() : 0;
      row[1] = static_cast<double>(lanes[l].batch.num_targets);
    }
    at::Tensor all = at::empty({kLanesPerRank * bench.world.size(), 2}, at::kDouble);
    bench.world.host->all_gather(mine, all, dist::Traffic::kControl, 0)->wait();
    for (int64_t l = 0; l < all.size(0); ++l) {
      loss += all[l][0].item<double>();
      result.targets += static_cast<int64_t>(all[l][1].item<double>());
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
  config.rows_per_lane = 1;
  config.num_lanes = config.num_local_lanes = 1;
  config.packing = data::Packing::kOff;
  data::Loader loader(config);
  models::Pass pass;
  pass.want = models::Want::kLogits;
  models::io::NamedTensors rows;
  for (bool last = false; !last;) {
    data::Loader::Step step = loader.next();
    last = step.last_of_epoch;
    const auto lanes = lanes_of(std::move(step), 0, bench.world.device);
    if (lanes.front().batch.empty()) continue;
    const at::Tensor logits_LV = bench.trunk->forward(lanes, pass).front()[0];
    rows.emplace_back("row." + std::to_string(rows.size()),
                      logits_LV.narrow(0, 0, lanes.front().batch.num_tokens).to(at::kFloat).cpu());
  }
  models::io::write_safetensors(path, rows, {});
}

}  // namespace graft::launcher
