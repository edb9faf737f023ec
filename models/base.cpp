#include "models/base.h"

#include <ATen/ATen.h>
#include <xxhash.h>

#include <algorithm>
#include <filesystem>

#include "configs/check.h"
#include "configs/schema.h"
#include "configs/yaml.h"
#include "kernels/random/random.h"
#include "models/io/gguf_source.h"
#include "models/io/json_file.h"
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

/// llama.cpp's hyperparameters under Hugging Face's names.
Json read_gguf(const std::string& path) {
  const io::GgufSource source(path);
  const io::GgufMetadata& m = source.metadata();
  const std::string arch = m.get_string("general.architecture");
  const auto key = [&](const char* tail) { return arch + "." + tail; };
  Json config = {
      {"model_type", arch},  // a Mistral file says llama: the same mathematics
      {"hidden_size", m.get_int(key("embedding_length"))},
      {"num_hidden_layers", m.get_int(key("block_count"))},
      {"num_attention_heads", m.get_int(key("attention.head_count"))},
      {"intermediate_size", m.get_int(key("feed_forward_length"))},
      {"max_position_embeddings", m.get_int(key("context_length"))},
      {"rms_norm_eps", m.get_float(key("attention.layer_norm_rms_epsilon"))},
      {"tie_word_embeddings", source.find("output.weight") == nullptr},
      {"attention_bias", source.find("blk.0.attn_q.bias") != nullptr},
  };
  const io::SourceTensor* table = source.find("token_embd.weight");
  GRAFT_CHECK(table != nullptr && table->shape.size() == 2, ExitCode::kData, path,
              ": no token_embd.weight");
  config["vocab_size"] = table->shape[0];
  const auto copy_int = [&](const char* tail, const char* name) {
    if (m.has(key(tail))) config[name] = m.get_int(key(tail));
  };
  copy_int("attention.head_count_kv", "num_key_value_heads");
  copy_int("attention.key_length", "head_dim");
  copy_int("attention.sliding_window", "sliding_window");
  Json rope = {
      {"rope_type", "default"},
      {"rope_theta", m.has(key("rope.freq_base")) ? m.get_float(key("rope.freq_base")) : 10000.0}};
  if (m.has(key("rope.scaling.type")) && m.get_string(key("rope.scaling.type")) != "none") {
    rope["rope_type"] = m.get_string(key("rope.scaling.type"));
    rope["factor"] = m.get_float(key("rope.scaling.factor"));
    if (m.has(key("rope.scaling.original_context_length"))) {
      rope["original_max_position_embeddings"] =
          m.get_int(key("rope.scaling.original_context_length"));
    }
  }
  // Llama 3 scaling is stored as divisors of the frequencies, computed from constants that the file
  // does not hold.
  GRAFT_CHECK(
      source.find("rope_freqs.weight") == nullptr, ExitCode::kData, path,
      ": holds rope_freqs.weight (Llama 3.1 scaling); use the safetensors files of this model");
  config["rope_parameters"] = rope;
  return config;
}

class RandomSource : public io::TensorSource {
 public:
  RandomSource(Model& model, uint64_t seed) : seed_(seed) {
    struct Collect : Visitor {
      std::vector<io::SourceTensor>& tensors;
      const NameMap& names;
      Collect(std::vector<io::SourceTensor>& t, const NameMap& n) : tensors(t), names(n) {}
      void weight(const std::string& name, Weight& w) override {
        tensors.push_back({names.to_hf(name)->name, w.shape(), "F32", w.numel() * 4});
      }
    } collect(tensors_, model.names());
    for (int b = 0; b < model.num_blocks(); ++b) model.visit_weights(b, collect);
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

}  // namespace

nlohmann::json read_base_config(const std::string& path) {
  namespace fs = std::filesystem;
  if (fs::is_directory(path)) {
    const std::string config = path + "/config.json";
    GRAFT_CHECK(fs::exists(config), ExitCode::kData, path,
                ": no config.json; expected a Hugging Face model folder");
    return io::read_json_file(config);
  }
  GRAFT_CHECK(fs::exists(path), ExitCode::kUsage, "model.name_or_path: ", path,
              " does not exist (a Hugging Face folder, a .gguf file, or a shape such as "
              "configs/models/tiny_llama.yaml)");
  return path.ends_with(".gguf") ? read_gguf(path) : read_shape_file(path);
}

std::unique_ptr<io::TensorSource> random_source(Model& model, uint64_t seed) {
  return std::make_unique<RandomSource>(model, seed);
}

}  // namespace graft::models
