// A tiny base with adapters, on one rank or as one of several virtual ones: what the tests of peft/
// train. Weights are those of tests/golden: a pure function of a tensor's Hugging Face name.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "dist/comm_factory.h"
#include "launcher/gradients.h"
#include "launcher/optim/rules.h"
#include "launcher/starts.h"
#include "models/base.h"
#include "models/load.h"
#include "models/trunk.h"
#include "peft/peft.h"
#include "tests/models/io_testing.h"

namespace graft::peft {

using models::io::golden;
using models::io::TestFolder;

/// Numbers in [-scale, scale) from a name: FNV-1a seeds a linear congruential generator (the
/// goldens' `fill`).
inline Tensor fill(const std::string& name, at::IntArrayRef shape, double scale) {
  uint32_t x = 2166136261U;
  for (const unsigned char c : name) x = (x ^ c) * 16777619U;
  Tensor out = at::empty(shape, at::kFloat);
  for (int64_t i = 0; i < out.numel(); ++i) {
    x = 1664525U * x + 1013904223U;
    out.data_ptr<float>()[i] = static_cast<float>(((x >> 8U) / 16777216.0 - 0.5) * 2.0 * scale);
  }
  return out;
}

/// What to load instead of a weight, by its Hugging Face name.
using EditWeight = std::function<Tensor(const std::string& name, Tensor weight)>;

/// The goldens' rule for base weights, over the names and shapes of a model.
class GoldenSource : public models::io::TensorSource {
 public:
  GoldenSource(models::Model& model, EditWeight edit)
      : shapes_(models::random_source(model, 0)), edit_(std::move(edit)) {}
  const std::vector<models::io::SourceTensor>& tensors() const override {
    return shapes_->tensors();
  }
  Tensor read(const std::string& name) override {
    return edit_ ? edit_(name, golden_value(name)) : golden_value(name);
  }
  std::string describe() const override { return "golden weights"; }

 private:
  Tensor golden_value(const std::string& name) const {
    const auto& shape = find(name)->shape;
    if (shape.size() == 2)
      return fill(name, shape, name == "model.embed_tokens.weight" ? 1.0 : 0.25);
    return fill(name, shape, 0.2) + (name.find("norm") != std::string::npos ? 1.0 : 0.0);
  }

  std::unique_ptr<models::io::TensorSource> shapes_;
  EditWeight edit_;
};

/// @param model  "llama"; "llama_tokens": the same with a head over 128 labels of each token
inline nlohmann::json tiny_config(const std::string& model) {
  const std::string shape = model.substr(0, model.find('_'));
  nlohmann::json config =
      models::read_base_config(GRAFT_SOURCE_DIR "/configs/models/tiny_" + shape + ".yaml");
  if (shape != model) models::make_classifier(config, models::Task::kTokenClassification, 128);
  return config;
}

/// Reads the fields of a method from YAML.
inline void read_fields(Method& method, const std::string& yaml) {
  configs::Problems problems;
  const configs::Node root = configs::parse_with_overrides(yaml, "options.yaml", {}, problems);
  if (problems.empty())
    configs::read_section(root, problems, [&](configs::Fields& f) { method.fields(f); });
  problems.throw_if_any("options.yaml");
}

/// Rows as Hugging Face has them: labels are not shifted yet.
inline data::Batch make_batch(const Tensor& tokens_BL, const Tensor& hf_labels_BL) {
  data::Batch batch;
  batch.tokens_BL = tokens_BL;
  batch.positions_BL = at::arange(tokens_BL.size(1)).expand_as(tokens_BL).contiguous();
  batch.documents_BL = at::zeros_like(tokens_BL);
  batch.labels_BL = at::constant_pad_nd(hf_labels_BL.slice(1, 1), {0, 1}, -100);
  batch.num_targets = batch.labels_BL.ge(0).sum().item<int64_t>();
  batch.num_tokens = tokens_BL.numel();
  return batch;
}

/// Lane `number`: two rows of 12 tokens, different in each lane.
inline models::Lane make_lane(int64_t number) {
  const Tensor tokens = (at::arange(24) * 37 + number * 29 + 11).remainder(127).reshape({2, 12});
  return {make_batch(tokens, tokens), number};
}

class Tiny : BaseWeights {
 public:
  explicit Tiny(const nlohmann::json& config)
      : single_(dist::make_single_comm()),
        model(models::make_model(config)),
        adapters(*model, at::kCPU, 7) {
    at::set_num_threads(1);
  }
  explicit Tiny(const char* model) : Tiny(tiny_config(model)) {}

  void attach(const std::string& name, std::shared_ptr<Method> method,
              std::optional<std::string> init_from = {}) {
    entries_.push_back({name, std::move(method), std::move(init_from)});
  }
  /// Attaches what attach() listed, loads the weights, sets initial values.
  void load(const models::LoadOptions& options = {}, dist::Comm* comm = nullptr,
            EditWeight edit = {}) {
    comm_ = comm == nullptr ? single_.get() : comm;
    if (!entries_.empty()) adapters.attach(entries_);
    GoldenSource source(*model, std::move(edit));
    models::LoadOptions prepared = options;
    const auto fill = [&]() -> models::Trunk& {
      trunk.reset();
      store = std::make_unique<dist::BlockStore>(*comm_, at::kCPU);
      models::load_weights(*model, *store, source, prepared);
      trunk = std::make_unique<models::Trunk>(*model, *store);
      return *trunk;
    };
    launcher::set_starts({*model, adapters, *comm_, source, options, at::kCPU, fill,
                          [this](const Calibration&) { return first_rows; }});
    if (adapters.changes_base()) {
      prepared.prepare_weight = [&](const std::string& name, Tensor w) {
        return adapters.prepare_weight(name, std::move(w));
      };
    }
    if (adapters.changes_base() || trunk == nullptr) fill();
    if (adapters.changes_base()) adapters.base_is_prepared();
    struct Collect : models::Visitor {
      std::map<std::string, models::Weight*>& weights;
      explicit Collect(std::map<std::string, models::Weight*>& w) : weights(w) {}
      void weight(const std::string& name, models::Weight& w) override { weights[name] = &w; }
    } collect(weights_);
    for (int b = 0; b < model->num_blocks(); ++b) model->visit_weights(b, collect);
    adapters.initialize(*this);
    optimizer = std::make_unique<launcher::AdamW>(adapters.params());
  }

  const std::vector<Param>& params() const { return adapters.params().all(); }
  /// Moves every parameter, so that none is at a special value (B of LoRA is zero).
  void jitter() {
    const at::NoGradGuard no_grad;
    for (const Param& p : params()) Tensor(p.value).add_(fill(p.name, p.value.sizes(), 0.1));
    adapters.publish();
  }

  struct Result {
    double loss = 0;  ///< mean over the targets of all ranks
    std::vector<Tensor> gradients;
  };
  /// @param lanes  those of this rank, of `num_lanes` over all ranks
  Result sweep(std::vector<models::Lane> lanes, int64_t num_lanes) {
    launcher::Gradients sink(adapters.params(), model->num_stages(), num_lanes,
                             launcher::Reduction::kTree, comm_);
    models::TrunkOptions options;
    options.random = kernels::derive({7, 1}, optimizer->num_steps());
    options.lowest_trained = adapters.params().lowest_stage();
    options.training = training;
    trunk->sweep(lanes, sink, options);
    Tensor sums = at::zeros({num_lanes + 1}, at::kDouble);  // each lane's loss, then the targets
    for (const models::Lane& lane : lanes) {
      sums[lane.number] = lane.loss_sum;
      sums[num_lanes] += lane.batch.num_targets;
    }
    comm_->all_reduce(sums, dist::Traffic::kReduced);
    const double targets = sums[num_lanes].item<double>();
    sink.reduce(*comm_, targets);
    Result result{sums.slice(0, 0, num_lanes).sum().item<double>() / targets, {}};
    for (const Tensor& g : sink.of()) result.gradients.push_back(g);
    return result;
  }
  /// One optimiser step; returns the loss before it.
  double step(const std::vector<models::Lane>& lanes, int64_t num_lanes,
              double learning_rate = 1e-2) {
    const Result result = sweep(lanes, num_lanes);
    adapters.after_reduce({optimizer->num_steps(), 100});
    optimizer->step(result.gradients, learning_rate);
    adapters.after_step({optimizer->num_steps() - 1, 100});
    return result.loss;
  }
  /// [B, L, V]
  Tensor logits(const data::Batch& batch, bool with_adapters = true) {
    models::Pass pass;
    pass.want = models::Want::kLogits;
    pass.adapters = with_adapters;
    const models::Lane lane{batch, 0};
    return trunk->forward({&lane, 1}, pass).front();
  }
  /// Writes the trained adapters as PEFT directories.
  void save(const std::string& directory) const {
    for (size_t i = 0; i < adapters.num_saved(); ++i) {
      const Peft::Saved saved = save_part(i);
      write_adapter(part_directory(directory, i, adapters.num_saved()), saved.config,
                    with_thawed(saved), saved.metadata);
    }
  }
  /// What save() writes of the first. Collective where weights are thawed; then only rank 0 has
  /// those.
  models::io::NamedTensors saved_tensors() const { return with_thawed(save_part(0)); }
  Peft::Saved save_part(size_t i) const {
    const std::string task(models::names_of(model->info().task).peft_type);
    return adapters.save(i, {"base", task, "print"});
  }
  static models::io::NamedTensors with_thawed(const Peft::Saved& saved) {
    models::io::NamedTensors tensors = saved.tensors;
    for (const auto& [key, weight] : saved.thawed) {
      if (Tensor whole = weight->collect(); whole.defined()) tensors.emplace_back(key, whole);
    }
    return tensors;
  }
  static void write_adapter(const std::string& directory, const nlohmann::json& config,
                            const models::io::NamedTensors& tensors,
                            const models::io::SafetensorsMetadata& metadata = {{"format", "pt"}}) {
    std::filesystem::create_directories(directory);
    std::ofstream(directory + "/adapter_config.json") << config.dump(2);
    models::io::write_safetensors(directory + "/adapter_model.safetensors", tensors, metadata);
  }

 private:
  Tensor weight(const LinearSite& site) override {
    const std::string own = site.name + ".weight";  // a tied head has none
    return copy(weights_.contains(own) ? own : "embed.weight");
  }
  Tensor bias(const LinearSite& site) override { return copy(site.name + ".bias"); }
  Tensor copy(const std::string& name) {
    const models::Weight& w = *weights_.at(name);
    const dist::Pin pin(*store, w.block());
    return w.dense().to(at::kFloat, false, true);
  }

  std::unique_ptr<dist::Comm> single_;
  dist::Comm* comm_ = nullptr;
  std::vector<MethodEntry> entries_;
  std::map<std::string, models::Weight*> weights_;

 public:
  std::unique_ptr<models::Model> model;
  Peft adapters;
  std::unique_ptr<dist::BlockStore> store;
  std::unique_ptr<models::Trunk> trunk;
  std::unique_ptr<launcher::AdamW> optimizer;
  bool training = true;  ///< in sweep(): dropout and its like
  /// What a method that starts from data sees.
  std::vector<models::Lane> first_rows = {make_lane(0), make_lane(1), make_lane(2), make_lane(3)};
};

}  // namespace graft::peft
