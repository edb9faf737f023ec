#include "launcher/workbench.h"

#include <ATen/ATen.h>

#include <chrono>
#include <cstdlib>

#include "configs/check.h"
#include "configs/log.h"
#include "launcher/adapter_folder.h"
#include "launcher/facts.h"
#include "launcher/progress.h"
#include "launcher/starts.h"
#include "launcher/task.h"
#include "launcher/trainer.h"
#include "models/base.h"
#include "models/load.h"
#include "models/names.h"

namespace graft::launcher {
namespace {

using at::Tensor;

models::Quantization quantization_of(const std::string& name) {
  if (name == "nf4") return models::Quantization::kNf4;
  if (name == "fp4") return models::Quantization::kFp4;
  return name == "int8" ? models::Quantization::kInt8 : models::Quantization::kNone;
}

/// `auto` is `world`: the placement by memory belongs to the planner. `node` is the group of one
/// host.
std::unique_ptr<dist::Comm> make_shard_comm(const World& world, const std::string& shard) {
  if (shard == "replicate" && world.size() > 1) return dist::make_single_comm();
  GRAFT_CHECK(shard != "node" || world.topology.num_nodes == 1,
              "parallel.shard: node needs all ranks on one node here; use world");
  return nullptr;
}

class LoadedWeights : public peft::BaseWeights {
 public:
  LoadedWeights(models::Model& model, dist::BlockStore& store) : store_(store) {
    models::for_each_weight(
        model, [&](int, const std::string& name, models::Weight& w) { weights_[name] = &w; });
  }
  at::Tensor weight(const peft::LinearSite& site) override {
    // A head without a matrix of its own shares the embedding's.
    return copy(weights_.contains(site.name + ".weight") ? site.name + ".weight" : "embed.weight");
  }
  at::Tensor bias(const peft::LinearSite& site) override { return copy(site.name + ".bias"); }

 private:
  at::Tensor copy(const std::string& name) {
    const models::Weight& w = *weights_.at(name);
    const dist::Pin pin(store_, w.block());
    return w.dense().to(at::kFloat, false, true);
  }
  dist::BlockStore& store_;
  std::map<std::string, models::Weight*> weights_;
};

/// Makes the store and fills it.
std::vector<models::SourceHash> fill_store(Workbench& bench, models::io::TensorSource& source,
                                           models::LoadOptions options) {
  bench.trunk.reset();
  bench.store = std::make_unique<dist::BlockStore>(
      bench.shard_comm ? *bench.shard_comm : bench.world.comm(), bench.world.device);
  Progress progress("loading " + source.describe());
  options.progress = [&](int64_t done, int64_t total) { progress.update(done, total); };
  return models::load_weights(*bench.model, *bench.store, source, options);
}

/// The first rows that the run will train on, whole micro-batches of it or a document each, the
/// same on every rank.
std::vector<models::Lane> first_rows(const Run& run, const World& world,
                                     const peft::Calibration& wanted) {
  GRAFT_CHECK(!run.data.train.values.empty(),
              "peft: a method starts from the first rows of data.train, which names no shards");
  data::LoaderConfig config = train_loader_config(run, world);
  config.num_lanes = config.num_local_lanes = 1, config.first_lane = 0;
  if (wanted.one_document) config.packing = data::Packing::kOff, config.rows_per_lane = 1;
  config.report = [](const data::BadSample& bad) { log::warn("skipping " + bad.reason); };
  data::Loader loader(config);
  std::vector<models::Lane> lanes;
  for (bool last = false;
       !last && static_cast<int64_t>(lanes.size()) * config.rows_per_lane < wanted.rows;) {
    data::Loader::Step step = loader.next();
    last = step.last_of_epoch;
    const auto number = static_cast<int64_t>(lanes.size());
    if (data::Batch& batch = step.lanes.front(); !batch.empty())
      lanes.push_back(make_lane(std::move(batch), number, world.device));
  }
  return lanes;
}

/// A run that asks for 4 bits and thaws every matrix would have none.
void check_something_is_quantised(models::Model& model, const RunConfig& config) {
  bool any = config.model.quantization == "none";
  models::for_each_weight(model, [&](int, const std::string&, const models::Weight& w) {
    any = any || (w.use() == models::WeightUse::kMatrix && !w.is_trained());
  });
  GRAFT_CHECK(any, "model.quantization: ", config.model.quantization,
              " has nothing to quantise: every matrix is trained, and those are kept "
              "unquantised; set model.quantization: none, or thaw fewer layers (freeze_layers)");
}

void load_base(Workbench& bench, const Run& config) {
  models::LoadOptions options;
  options.quantization = quantization_of(config.model.quantization);
  options.double_quantization = config.model.double_quantization;
  options.compute_dtype = bench.dtype;
  const auto source =
      config.model.weights == "random"
          ? models::random_source(*bench.model, static_cast<uint64_t>(config.train.seed))
          : models::open_base(config.model.name_or_path, *bench.model,
                              static_cast<uint64_t>(config.train.seed));
  std::vector<models::SourceHash> hashes;
  const auto load = [&]() -> models::Trunk& {
    hashes = fill_store(bench, *source, options);
    bench.trunk = std::make_unique<models::Trunk>(*bench.model, *bench.store,
                                                  config.parallel.prefetch_blocks);
    return *bench.trunk;
  };
  peft::Peft& adapters = *bench.adapters;
  set_starts(
      {*bench.model, adapters, *bench.world.host, *source, options, bench.world.device, load,
       [&](const peft::Calibration& wanted) { return first_rows(config, bench.world, wanted); }});
  // In four bits the file's codes stay as they are: there the adapters compute on the plain base.
  const bool prepared = adapters.changes_base() && !models::holds_four_bit(*source);
  if (prepared) {
    options.prepare_weight = [&](const std::string& name, Tensor w) {
      return adapters.prepare_weight(name, std::move(w));
    };
  }
  if (prepared || bench.store == nullptr) load();
  if (prepared) adapters.base_is_prepared();
  // The ranks shared the tensors out; all of them make the fingerprint, wherever the shards went.
  std::string mine;
  for (const auto& h : hashes) mine += h.name + " " + h.hash + "\n";
  std::vector<models::SourceHash> all;
  for (const std::string& text : dist::gather_texts(*bench.world.host, mine)) {
    std::istringstream in(text);
    for (models::SourceHash h; in >> h.name >> h.hash;) {
      const bool seen =
          std::any_of(all.begin(), all.end(), [&](const auto& o) { return o.name == h.name; });
      if (!seen) all.push_back(h);
    }
  }
  bench.fingerprint = models::fingerprint(std::move(all));
}

}  // namespace

std::unique_ptr<peft::BaseWeights> Workbench::base_weights() {
  return std::make_unique<LoadedWeights>(*model, *store);
}

void attach_frozen(peft::Peft& adapters, const ModelConfig& model) {
  for (size_t i = 0; i < model.adapters.values.size(); ++i) attach_frozen(adapters, model, i);
  if (model.active_adapters) adapters.activate(*model.active_adapters);
}

void attach_frozen(peft::Peft& adapters, const ModelConfig& model, size_t i) {
  adapters.attach_frozen(model.adapters.values[i],
                         model.adapter_weights.empty() ? 1 : model.adapter_weights[i],
                         model.adapter_names.empty() ? "" : model.adapter_names[i]);
}

void add_adapter(ModelConfig& model, const std::string& text) {
  const auto [directory, weight] = read_choice(text);
  for (const std::string& part : adapter_parts(directory)) {
    model.adapter_weights.resize(model.adapters.values.size(), 1);
    if (!model.adapter_names.empty()) model.adapter_names.push_back(part);
    if (model.active_adapters)
      model.active_adapters->push_back(model.adapter_names.empty() ? part
                                                                   : model.adapter_names.back());
    model.adapters.values.push_back(part);
    model.adapter_weights.push_back(weight);
  }
}

Workbench build_workbench(World& world, Run& config, const std::string& resume) {
  Workbench bench{world, compute_dtype(config.model.dtype, world.device), {}, {}, {}, {}, {}, {}};
  bench.labels = labels_of(config);
  bench.model = models::make_model(base_config(config, bench.labels.size()));
  bench.adapters = std::make_unique<peft::Peft>(*bench.model, world.device,
                                                static_cast<uint64_t>(config.train.seed));
  attach_frozen(*bench.adapters, config.model);
  bench.adapters->attach(config.peft, resume);
  check_something_is_quantised(*bench.model, config);
  bench.shard_comm = make_shard_comm(world, config.parallel.shard);
  load_base(bench, config);
  if (!config.model.any_base) bench.adapters->check_fingerprints([&] { return bench.fingerprint; });
  bench.adapters->initialize(*bench.base_weights());
  return bench;
}

}  // namespace graft::launcher
