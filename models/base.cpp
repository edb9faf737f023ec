#include "models/base.h"

#include <ATen/ATen.h>
#include <xxhash.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <set>
#include <type_traits>

#include "configs/check.h"
#include "configs/schema.h"
#include "configs/yaml.h"
#include "kernels/random/random.h"
#include "models/io/gguf_source.h"
#include "models/io/json_file.h"
#include "models/io/open_source.h"
#include "models/match.h"
#include "models/names.h"

namespace graft::models {
namespace {

using Json = nlohmann::json;

/// A YAML tree as JSON: a scalar without quotes is what JSON makes of it, else a string.
Json to_json(const configs::Node& node) {
  using Kind = configs::Node::Kind;
  if (node.kind == Kind::kNull) return nullptr;
  if (node.kind == Kind::kScalar) {
    Json value = node.quoted ? Json() : Json::parse(node.text, nullptr, false);
    return value.is_primitive() && !value.is_null() && !value.is_discarded() ? value
                                                                             : Json(node.text);
  }
  Json out = node.kind == Kind::kList ? Json::array() : Json::object();
  for (const configs::Node& item : node.items) {
    if (node.kind == Kind::kList) {
      out.push_back(to_json(item));
    } else {
      out[item.key] = to_json(item);
    }
  }
  return out;
}

Json read_shape_file(const std::string& path) {
  configs::Problems problems;
  const auto root = configs::parse_yaml(configs::read_file(path), problems);
  problems.throw_if_any(path);
  GRAFT_CHECK(root && root->kind == configs::Node::Kind::kMap, ExitCode::kData, path,
              ": not a mapping");
  return to_json(*root);
}

/// A metadata value as a number, NaN if it is a text or a list.
double number_of(const io::GgufValue& value) {
  return std::visit(
      [](const auto& v) {
        if constexpr (std::is_arithmetic_v<std::decay_t<decltype(v)>>) {
          return static_cast<double>(v);
        } else {
          return std::nan("");
        }
      },
      value);
}

/// Refuses what the file says about its architecture and read_gguf does not read, unless it says
/// what is computed anyway. (llama.cpp takes a scale of 0 for one that is not set.)
void check_hyperparameters(const io::GgufMetadata& metadata, const std::string& prefix,
                           double head_dim, const std::string& path) {
  static const std::set<std::string_view> kRead = {
      "embedding_length", "block_count", "feed_forward_length", "context_length", "vocab_size",
      "attention.head_count", "attention.head_count_kv", "attention.key_length",
      "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.freq_base",
      "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
      "rope.scaling.original_context_length",
      // These say how the file came about, not what is computed.
      "rope.scaling.finetuned", "tensor_data_layout"};
  const std::map<std::string_view, std::vector<double>> computed = {
      {"rope.dimension_count", {head_dim}},
      {"rope.scaling.attn_factor", {1}},
      {"rope.scaling.yarn_ext_factor", {-1}},
      {"rope.scaling.yarn_attn_factor", {1}},
      {"rope.scaling.yarn_beta_fast", {32}},
      {"rope.scaling.yarn_beta_slow", {1}},
      {"rope.scaling.yarn_log_multiplier", {0}},
      {"attention.value_length", {head_dim}},
      {"attention.scale", {1 / std::sqrt(head_dim), 0}},
      {"attention.causal", {1}},
      {"attention.clamp_kqv", {0}},
      {"attention.max_alibi_bias", {0}},
      {"logit_scale", {1, 0}},
      {"embedding_scale", {1, 0}},
      {"residual_scale", {1, 0}},
      {"use_parallel_residual", {0}},
      {"expert_count", {0}},
      {"expert_used_count", {0}},
  };
  for (const auto& [key, value] : metadata.values()) {
    if (!key.starts_with(prefix)) continue;
    const std::string_view name = std::string_view(key).substr(prefix.size());
    if (kRead.contains(name)) continue;
    const auto found = computed.find(name);
    const double number = number_of(value);
    const bool harmless =
        found != computed.end() &&
        std::any_of(found->second.begin(), found->second.end(), [&](double expected) {
          return std::abs(number - expected) <= 1e-6 * std::abs(expected);
        });
    GRAFT_CHECK(
        harmless, ExitCode::kData, path, ": metadata '", key, "'",
        std::isnan(number) ? "" : " = " + std::to_string(number),
        " is not supported: it changes what the model computes",
        found == computed.end() ? "" : " (expected " + std::to_string(found->second.front()) + ")");
  }
}

/// The rope_parameters of a GGUF file. llama.cpp scales linearly if a factor comes without a type.
Json read_gguf_rope(const io::GgufMetadata& m, const std::string& prefix) {
  const auto number = [&](const char* name, double fallback) {
    return m.has(prefix + name) ? m.get_float(prefix + name) : fallback;
  };
  Json rope = {{"rope_type", "default"}, {"rope_theta", number("rope.freq_base", 10000.0)}};
  const std::string type_key = prefix + "rope.scaling.type";
  const std::string type = m.has(type_key) ? m.get_string(type_key) : "linear";
  const double factor = number("rope.scaling.factor", number("rope.scale_linear", 0));
  if (type == "none" || (type == "linear" && factor == 0)) return rope;
  rope["rope_type"] = type;
  rope["factor"] = factor;
  const std::string original = prefix + "rope.scaling.original_context_length";
  if (m.has(original)) rope["original_max_position_embeddings"] = m.get_int(original);
  return rope;
}

/// llama.cpp's hyperparameters under Hugging Face's names.
Json read_gguf(const std::string& path) {
  const io::GgufSource source(path);
  const io::GgufMetadata& m = source.metadata();
  const std::string arch = m.get_string("general.architecture"), prefix = arch + ".";
  const auto integer = [&](const char* name) { return m.get_int(prefix + name); };
  const auto integer_or = [&](const char* name, int64_t fallback) {
    return m.has(prefix + name) ? integer(name) : fallback;
  };
  const io::SourceTensor* table = source.find("token_embd.weight");
  GRAFT_CHECK(table != nullptr && table->shape.size() == 2, ExitCode::kData, path,
              ": no token_embd.weight");
  // Llama 3 scaling is stored as divisors of the frequencies, computed from constants that the file
  // does not hold.
  GRAFT_CHECK(
      source.find("rope_freqs.weight") == nullptr, ExitCode::kData, path,
      ": holds rope_freqs.weight (Llama 3.1 scaling); use the safetensors files of this model");
  const int64_t width = integer("embedding_length"), heads = integer("attention.head_count");
  const int64_t head_dim =
      integer_or("attention.key_length", heads > 0 ? width / heads : int64_t{0});
  check_hyperparameters(m, prefix, static_cast<double>(head_dim), path);
  const int64_t window = integer_or("attention.sliding_window", 0);
  GRAFT_CHECK(window == 0 || arch == "llama", ExitCode::kData, path, ": metadata '", prefix,
              "attention.sliding_window' = ", window, " is not supported in this architecture");
  return {
      // A Mistral file says llama: the same mathematics but for the window.
      {"model_type", window == 0 ? arch : "mistral"},
      {"hidden_size", width},
      {"num_hidden_layers", integer("block_count")},
      {"num_attention_heads", heads},
      {"num_key_value_heads", integer_or("attention.head_count_kv", heads)},
      {"head_dim", head_dim},
      {"intermediate_size", integer("feed_forward_length")},
      {"vocab_size", table->shape[0]},
      {"max_position_embeddings", integer("context_length")},
      {"rms_norm_eps", m.get_float(prefix + "attention.layer_norm_rms_epsilon")},
      {"tie_word_embeddings", source.find("output.weight") == nullptr},
      {"attention_bias", source.find("blk.0.attn_q.bias") != nullptr},
      {"sliding_window", window == 0 ? Json() : Json(window)},
      {"rope_parameters", read_gguf_rope(m, prefix)},
  };
}

/// Whether the folder's weights have a head that is not the embedding's table. One table is in
/// memory at a time.
bool has_own_head(const std::string& folder) {
  if (!io::has_safetensors(folder)) return false;  // a config without weights
  const auto source = io::open_source(folder);
  const io::SourceTensor* table = source->find(kEmbeddingTensor);
  const io::SourceTensor* head = source->find(kHeadTensor);
  if (table == nullptr || head == nullptr) return false;
  if (table->shape != head->shape || table->dtype != head->dtype) return true;
  const auto hash = [&](const io::SourceTensor& tensor) {
    const Tensor values = source->read(tensor.name);
    return XXH3_128bits(values.const_data_ptr(), values.nbytes());
  };
  return XXH128_isEqual(hash(*table), hash(*head)) == 0;
}

Json read_folder(const std::string& folder) {
  const std::string path = folder + "/config.json";
  GRAFT_CHECK(std::filesystem::exists(path), ExitCode::kData, folder,
              ": no config.json; expected a Hugging Face model folder");
  Json config = io::read_json_file(path);
  GRAFT_CHECK(config.is_object(), ExitCode::kData, path, ": expected a JSON object, found ",
              config.type_name());
  const auto tied = config.find("tie_word_embeddings");
  if (tied != config.end() && *tied == true && has_own_head(folder)) *tied = false;
  return config;
}

class RandomSource : public io::TensorSource {
 public:
  RandomSource(Model& model, uint64_t seed) : seed_(seed) {
    for_each_weight(model, [&](int, const std::string& name, const Weight& w) {
      tensors_.push_back({model.names().to_hf(name)->name, w.shape(), "F32", w.numel() * 4});
    });
    std::sort(tensors_.begin(), tensors_.end(),
              [](const auto& a, const auto& b) { return a.name < b.name; });
  }
  const std::vector<io::SourceTensor>& tensors() const override { return tensors_; }
  Tensor read(const std::string& name) override {
    const io::SourceTensor* tensor = find(name);
    GRAFT_ASSERT(tensor != nullptr, name);
    Tensor t = at::ones(tensor->shape);
    if (tensor->shape.size() == 1 && name.find("norm") != std::string::npos) return t;
    kernels::normal(t, kernels::derive({seed_, 0}, XXH3_64bits(name.data(), name.size())));
    return t.mul_(0.02);
  }
  std::string describe() const override { return "random weights, seed " + std::to_string(seed_); }

 private:
  uint64_t seed_;
  std::vector<io::SourceTensor> tensors_;
};

/// A base's files and the tensors of a new head; these cost nothing to read.
class WithNewHead : public io::TensorSource {
 public:
  WithNewHead(std::unique_ptr<io::TensorSource> files, Model& model, uint64_t seed)
      : files_(std::move(files)), seed_(seed), deviation_(model.info().initializer_range) {
    tensors_ = files_->tensors();
    for_each_weight(model, [&](int, const std::string& name, const Weight& w) {
      const std::string hf = model.names().to_hf(name)->name;
      if (name.starts_with("head.") && files_->find(hf) == nullptr)
        tensors_.push_back({hf, w.shape(), "F32", 0});
    });
    std::sort(tensors_.begin(), tensors_.end(),
              [](const auto& a, const auto& b) { return a.name < b.name; });
  }
  const std::vector<io::SourceTensor>& tensors() const override { return tensors_; }
  Tensor read(const std::string& name) override {
    if (files_->find(name) != nullptr) return files_->read(name);
    Tensor t = at::zeros(find(name)->shape);
    if (t.dim() == 1) return t;
    kernels::normal(t, kernels::derive({seed_, 0}, XXH3_64bits(name.data(), name.size())));
    return t.mul_(deviation_);
  }
  std::optional<io::FourBit> read_four_bit(const std::string& name) override {
    return files_->find(name) != nullptr ? files_->read_four_bit(name) : std::nullopt;
  }
  std::string describe() const override { return files_->describe(); }

 private:
  std::unique_ptr<io::TensorSource> files_;
  uint64_t seed_;
  double deviation_;
  std::vector<io::SourceTensor> tensors_;
};

}  // namespace

void make_classifier(Json& config, Task task, int64_t num_labels) {
  const ModelInfo info = make_model(config)->info();
  const std::string_view name = names_of(info.task).name;
  GRAFT_CHECK(info.task == Task::kCausalLm || info.task == task, "the base is a ", info.hf_class,
              ", which is for train.task: ", name, ", not ", names_of(task).name);
  GRAFT_CHECK(info.task == Task::kCausalLm || info.num_outputs == num_labels, "the base is a ",
              info.hf_class, " with ", info.num_outputs, " labels, the data has ", num_labels);
  config["architectures"] = {std::string(names_of(task).hf_class)};
  config["num_labels"] = num_labels;
  config.erase("id2label");
}

std::unique_ptr<io::TensorSource> open_base(const std::string& path, Model& model, uint64_t seed) {
  auto source = io::open_source(path);
  if (model.info().task == Task::kCausalLm) return source;
  return std::make_unique<WithNewHead>(std::move(source), model, seed);
}

nlohmann::json read_base_config(const std::string& path) {
  namespace fs = std::filesystem;
  if (fs::is_directory(path)) return read_folder(path);
  GRAFT_CHECK(fs::exists(path), ExitCode::kUsage, "model.name_or_path: ", path,
              " does not exist (a Hugging Face folder, a .gguf file, or a shape such as "
              "configs/models/tiny_llama.yaml)");
  return path.ends_with(".gguf") ? read_gguf(path) : read_shape_file(path);
}

std::unique_ptr<io::TensorSource> random_source(Model& model, uint64_t seed) {
  return std::make_unique<RandomSource>(model, seed);
}

}  // namespace graft::models
