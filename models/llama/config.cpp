// Hugging Face config.json, of transformers 4 or 5, to LlamaConfig.
#include <map>
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "models/llama/llama.h"

namespace graft::models {
namespace {

using Json = nlohmann::json;

const Json* field(const Json& object, const char* name) {
  const auto it = object.find(name);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

template <class T>
T get(const Json& object, const char* name, T fallback) {
  const Json* value = field(object, name);
  if (value == nullptr) return fallback;
  const bool fits = std::is_same_v<T, bool>     ? value->is_boolean()
                    : std::is_same_v<T, double> ? value->is_number()
                    : std::is_integral_v<T>     ? value->is_number_integer()
                                                : value->is_string();
  GRAFT_CHECK(fits, ExitCode::kData, "model config: ", name, " = ", value->dump(),
              " has the wrong type");
  return value->get<T>();
}

int64_t size(const Json& config, const char* name, int64_t fallback = 0) {
  constexpr int64_t kMost = int64_t{1}
                            << 24;  // wider than any model; products of three stay in 64 bits
  const auto value = get<int64_t>(config, name, fallback);
  GRAFT_CHECK(value > 0 && value <= kMost, ExitCode::kData, "model config: ", name, " = ", value,
              ", expected 1 to ", kMost);
  return value;
}

std::vector<double> numbers(const Json& object, const char* name) {
  const Json* value = field(object, name);
  if (value == nullptr) return {};
  GRAFT_CHECK(value->is_array(), ExitCode::kData, "model config: ", name, " is not a list");
  std::vector<double> out;
  for (const Json& x : *value) {
    GRAFT_CHECK(x.is_number(), ExitCode::kData, "model config: ", name, " holds ", x.dump());
    out.push_back(x.get<double>());
  }
  return out;
}

/// The keys that a scaling rule cannot do without.
void check_rope_type(const Json& scaling, const std::string& type) {
  static const std::map<std::string, std::vector<const char*>> kNeeded = {
      {"default", {}},         {"linear", {"factor"}},
      {"dynamic", {"factor"}}, {"llama3", {"factor", "low_freq_factor", "high_freq_factor"}},
      {"yarn", {"factor"}},    {"longrope", {"short_factor", "long_factor"}},
  };
  const auto needed = kNeeded.find(type);
  GRAFT_CHECK(needed != kNeeded.end(), ExitCode::kData, "model config: rope_type '", type,
              "' is not known; known: default, linear, dynamic, llama3, yarn, longrope");
  for (const char* name : needed->second) {
    GRAFT_CHECK(field(scaling, name) != nullptr, ExitCode::kData, "model config: rope_type ", type,
                " needs ", name);
  }
}

/// transformers 5 has one dict, rope_parameters; 4 has rope_theta and rope_scaling with `rope_type`
/// or `type`. Of both, 5.17 takes a rope_scaling that is not empty, and the theta of neither
/// rope_parameters.
RopeConfig read_rope(const Json& config, int64_t max_length, int64_t head_dim) {
  const Json* nested = field(config, "rope_scaling");
  if (nested == nullptr || nested->empty()) nested = field(config, "rope_parameters");
  const Json scaling = nested == nullptr ? Json::object() : *nested;
  GRAFT_CHECK(scaling.is_object(), ExitCode::kData,
              "model config: rope_scaling or rope_parameters is not an object");
  GRAFT_CHECK(get(scaling, "partial_rotary_factor", get(config, "partial_rotary_factor", 1.0)) == 1,
              ExitCode::kData,
              "model config: partial_rotary_factor other than 1 is not in this family");
  RopeConfig rope;
  rope.theta = get(scaling, "rope_theta", get(config, "rope_theta", 10000.0));
  rope.type = get<std::string>(scaling, "rope_type", get<std::string>(scaling, "type", "default"));
  check_rope_type(scaling, rope.type);
  const bool outside = field(config, "original_max_position_embeddings") != nullptr;
  rope.original_length =
      size(outside ? config : scaling, "original_max_position_embeddings", max_length);
  const auto ratio = static_cast<double>(max_length) / static_cast<double>(rope.original_length);
  rope.factor = get(scaling, "factor", rope.type == "longrope" ? ratio : 1.0);
  GRAFT_CHECK(rope.theta > 0 && rope.factor > 0, ExitCode::kData,
              "model config: rope_theta = ", rope.theta, ", factor = ", rope.factor,
              ", expected positive numbers");
  rope.low_freq_factor = get(scaling, "low_freq_factor", 1.0);
  rope.high_freq_factor = get(scaling, "high_freq_factor", 4.0);
  rope.beta_fast = get(scaling, "beta_fast", 32.0);
  rope.beta_slow = get(scaling, "beta_slow", 1.0);
  rope.attention_factor = get(scaling, "attention_factor", 0.0);
  rope.mscale = get(scaling, "mscale", 0.0);
  rope.mscale_all_dim = get(scaling, "mscale_all_dim", 0.0);
  rope.truncate = get(scaling, "truncate", true);
  rope.short_factor = numbers(scaling, "short_factor");
  rope.long_factor = numbers(scaling, "long_factor");
  for (const auto* factors : {&rope.short_factor, &rope.long_factor}) {
    GRAFT_CHECK(rope.type != "longrope" || std::ssize(*factors) == head_dim / 2, ExitCode::kData,
                "model config: longrope has ", factors->size(), " factors, expected ", head_dim / 2,
                " (head_dim / 2)");
  }
  return rope;
}

/// Window of each layer. Mistral: all. Qwen: off unless use_sliding_window, then from
/// max_window_layers on. transformers' configs have 4096 where the key is absent; null is none.
std::vector<int64_t> read_windows(const Json& config, const LlamaConfig& c) {
  std::vector<int64_t> windows(static_cast<size_t>(c.num_hidden_layers), 0);
  const auto width =
      get<int64_t>(config, "sliding_window", config.contains("sliding_window") ? 0 : 4096);
  GRAFT_CHECK(width >= 0, ExitCode::kData, "model config: sliding_window = ", width,
              ", expected 0 (none) or more");
  const bool qwen = c.model_type.starts_with("qwen");
  if (width == 0 || c.model_type == "llama" ||
      (qwen && !get(config, "use_sliding_window", false))) {
    return windows;
  }
  const Json* types = field(config, "layer_types");
  const auto from = qwen ? get<int64_t>(config, "max_window_layers", 28) : 0;
  for (size_t i = 0; i < windows.size(); ++i) {
    const bool slides = types != nullptr && types->is_array() && i < types->size()
                            ? (*types)[i] == "sliding_attention"
                            : static_cast<int64_t>(i) >= from;
    if (slides) windows[i] = width;
  }
  return windows;
}

/// Whose head it is, from the class that wrote the config; one without a class is a causal LM's. A
/// config leaves out id2label where there are two labels without names.
void read_task(const Json& config, LlamaConfig& c) {
  const Json* classes = field(config, "architectures");
  if (classes == nullptr || !classes->is_array() || classes->empty()) return;
  const Json& name = classes->front();
  for (const TaskNames& task : kTasks) {
    if (name.is_string() && name.get<std::string>().ends_with(task.hf_class)) c.task = task.task;
  }
  if (c.task == Task::kCausalLm) return;
  const Json* labels = field(config, "id2label");
  c.num_labels = labels != nullptr && labels->is_object() ? std::ssize(*labels)
                                                          : size(config, "num_labels", 2);
  c.tie_word_embeddings = false;  // a classifier's head is its own
}

}  // namespace

LlamaConfig LlamaConfig::from_json(const Json& config) {
  LlamaConfig c;
  c.model_type = get<std::string>(config, "model_type", "llama");
  c.hidden_size = size(config, "hidden_size");
  c.num_hidden_layers = size(config, "num_hidden_layers");
  c.num_attention_heads = size(config, "num_attention_heads");
  c.num_key_value_heads = size(config, "num_key_value_heads", c.num_attention_heads);
  c.head_dim = size(config, "head_dim", c.hidden_size / c.num_attention_heads);
  c.intermediate_size = size(config, "intermediate_size");
  c.vocab_size = size(config, "vocab_size");
  c.max_position_embeddings = size(config, "max_position_embeddings", 2048);
  GRAFT_CHECK(c.num_hidden_layers <= 10000, ExitCode::kData,
              "model config: num_hidden_layers = ", c.num_hidden_layers, ", expected 1 to 10000");
  GRAFT_CHECK(c.num_attention_heads % c.num_key_value_heads == 0, ExitCode::kData,
              "model config: num_attention_heads = ", c.num_attention_heads,
              " is not a multiple of num_key_value_heads = ", c.num_key_value_heads);
  GRAFT_CHECK(c.head_dim % 2 == 0, ExitCode::kData, "model config: head_dim = ", c.head_dim,
              " is odd");
  const auto act = get<std::string>(config, "hidden_act", "silu");
  GRAFT_CHECK(act == "silu" || act == "swish", ExitCode::kData, "model config: hidden_act = ", act,
              ", this family has silu");
  c.rms_norm_eps = get(config, "rms_norm_eps", 1e-6);
  c.rope = read_rope(config, c.max_position_embeddings, c.head_dim);
  c.tie_word_embeddings = get(config, "tie_word_embeddings", false);
  c.initializer_range = get(config, "initializer_range", 0.02);
  read_task(config, c);
  c.qkv_bias = get(config, "attention_bias", c.model_type == "qwen2");
  c.o_bias = c.model_type == "llama" || c.model_type == "qwen3" ? c.qkv_bias : false;
  c.mlp_bias = get(config, "mlp_bias", false);
  c.qk_norm = c.model_type == "qwen3";
  c.window = read_windows(config, c);
  return c;
}

}  // namespace graft::models
