#include "tests/testing.h"

#include <ATen/ATen.h>

#include <fstream>
#include <limits>

#include "kernels/random/random.h"
#include "models/base.h"
#include "models/names.h"

namespace graft::testing {
namespace {

/// Every weight of a model by our name.
struct WeightsByName : models::Visitor {
  std::map<std::string, models::Weight*> weights;
  explicit WeightsByName(models::Model& model) {
    for (int block = 0; block < model.num_blocks(); ++block) model.visit_weights(block, *this);
  }
  void weight(const std::string& name, models::Weight& w) override { weights[name] = &w; }
};

Tensor only_output(models::Trunk& trunk, const data::Batch& batch, models::Want want) {
  models::Pass pass;
  pass.want = want;
  const std::vector<models::Lane> lanes = {{batch}};
  return trunk.forward(lanes, pass).front();
}

}  // namespace

nlohmann::json golden(const std::string& name) {
  return nlohmann::json::parse(std::ifstream(GRAFT_SOURCE_DIR "/tests/golden/" + name));
}

Tensor fill(std::string_view name, at::IntArrayRef shape, double scale) {
  uint32_t state = 2166136261U;
  for (const char c : name) state = (state ^ static_cast<uint8_t>(c)) * 16777619U;
  Tensor out = at::empty(shape, at::kFloat);
  auto* values = out.mutable_data_ptr<float>();
  for (int64_t i = 0; i < out.numel(); ++i) {
    state = 1664525U * state + 1013904223U;
    values[i] =
        static_cast<float>((static_cast<double>(state >> 8U) / 16777216.0 - 0.5) * 2.0 * scale);
  }
  return out;
}

Tensor golden_weight(std::string_view hf_name, at::IntArrayRef shape) {
  const auto holds = [&](const char* part) { return hf_name.find(part) != std::string_view::npos; };
  if (shape.size() == 1) return fill(hf_name, shape, 0.2).add_(holds("norm") ? 1.0 : 0.0);
  return fill(hf_name, shape, holds("embed_tokens") ? 1.0 : 0.25);
}

double relative_error(const Tensor& actual, const Tensor& expected) {
  if (actual.sizes() != expected.sizes()) return std::numeric_limits<double>::infinity();
  const Tensor error =
      (actual.to(at::kDouble) - expected).abs().max() / expected.to(at::kDouble).abs().max();
  return error.item<double>();
}

data::Batch batch_of(const Tensor& tokens_BL, const Tensor& labels_BL) {
  data::Batch batch;
  batch.tokens_BL = tokens_BL;
  batch.positions_BL = at::arange(tokens_BL.size(1), at::kLong).expand_as(tokens_BL).contiguous();
  batch.documents_BL = at::zeros_like(tokens_BL);
  batch.labels_BL = at::full_like(tokens_BL, -100);
  batch.labels_BL.slice(1, 0, -1).copy_(labels_BL.slice(1, 1));
  batch.num_targets = batch.labels_BL.ne(-100).sum().item<int64_t>();
  batch.num_tokens = tokens_BL.numel();
  return batch;
}

data::Batch batch_of(const Tensor& tokens_BL) { return batch_of(tokens_BL, tokens_BL); }

Tensor random_tokens(int64_t rows, int64_t length, int64_t vocab_size, uint64_t seed) {
  const Tensor unit = at::empty({rows, length}, at::kFloat);
  kernels::uniform(unit, {seed, 0});
  return unit.mul(static_cast<double>(vocab_size)).to(at::kLong);
}

MemorySource::MemorySource(std::map<std::string, Tensor> values) : values_(std::move(values)) {
  for (const auto& [name, value] : values_) {
    const char* dtype = value.scalar_type() == at::kBFloat16 ? "BF16"
                        : value.scalar_type() == at::kHalf   ? "F16"
                        : value.scalar_type() == at::kDouble ? "F64"
                                                             : "F32";
    tensors_.push_back({name, value.sizes().vec(), dtype, static_cast<int64_t>(value.nbytes())});
  }
}

std::map<std::string, Tensor> golden_weights(models::Model& model) {
  std::map<std::string, Tensor> values;
  for (const auto& [name, weight] : WeightsByName(model).weights) {
    const std::string hf = model.names().to_hf(name)->name;
    values[hf] = golden_weight(hf, weight->shape());
  }
  return values;
}

nlohmann::json tiny_llama(int layers, bool tied_head) {
  return {{"model_type", "llama"},
          {"hidden_size", 48},
          {"intermediate_size", 80},
          {"num_hidden_layers", layers},
          {"num_attention_heads", 6},
          {"num_key_value_heads", 2},
          {"head_dim", 16},
          {"vocab_size", 128},
          {"max_position_embeddings", 64},
          {"tie_word_embeddings", tied_head}};
}

models::LoadOptions unquantised() {
  models::LoadOptions options;
  options.quantization = models::Quantization::kNone;
  return options;
}

Base::Base(const nlohmann::json& config, models::io::TensorSource& source, dist::Comm& comm,
           const models::LoadOptions& options)
    : model(models::make_model(config)) {
  load(source, comm, options);
}

Base::Base(const nlohmann::json& config, dist::Comm& comm, const models::LoadOptions& options)
    : model(models::make_model(config)) {
  MemorySource source(golden_weights(*model));
  load(source, comm, options);
}

void Base::load(models::io::TensorSource& source, dist::Comm& comm,
                const models::LoadOptions& options) {
  store = std::make_unique<dist::BlockStore>(comm, at::kCPU);
  hashes = models::load_weights(*model, *store, source, options);
  trunk = std::make_unique<models::Trunk>(*model, *store);
}

Tensor Base::logits(const data::Batch& batch) const {
  return only_output(*trunk, batch, models::Want::kLogits);
}

double Base::mean_loss(const data::Batch& batch) const {
  return only_output(*trunk, batch, models::Want::kLoss).item<double>() /
         static_cast<double>(batch.num_targets);
}

models::Weight& Base::weight(const std::string& name) const {
  return *WeightsByName(*model).weights.at(name);
}

std::unique_ptr<peft::Peft> attach(models::Model& model, const std::string& method,
                                   const nlohmann::json& config) {
  std::vector<peft::MethodEntry> entries = {{method, peft::methods().make(method), {}}};
  configs::Problems problems;
  const configs::Node root = configs::parse_with_overrides(config.dump(), "config", {}, problems);
  configs::read_section(root, problems,
                        [&](configs::Fields& f) { entries.front().method->fields(f); });
  problems.throw_if_any("config");
  auto adapters = std::make_unique<peft::Peft>(model, at::kCPU, 1);
  adapters->attach(entries);
  const at::NoGradGuard no_grad;
  for (const peft::Param& param : adapters->params().all()) {
    Tensor value = param.value;
    value.copy_(fill(param.name, value.sizes(), 0.2));
  }
  return adapters;
}

}  // namespace graft::testing
