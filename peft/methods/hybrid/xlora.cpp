// X-LoRA: y = W x + g sum_n s_n (alpha_n / r_n) B_n A_n x, s = softmax(router(h)) of each token.
//       Buehler and Buehler 2024, arXiv:2402.07148
// Trains the router: a linear layer, or an MLP of ReLUs, over the last hidden state h of the base
// without any adapter (Pass::look_BTD). `adapters` are directories of LoRAs, frozen: they drop
// nothing. The model is not the base at step 0. Not mergeable. Fields and files are those of HF
// PEFT's XLoraConfig, where `adapters` has the names "0", "1" ... (it mixes no others). PEFT's
// use_trainable_adapters (it does not save what that trains) and scaling_pass_value (LoRAs in the
// look) have one value here; its LoRAs may also be on the embedding and the head.
#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "peft/attach.h"
#include "peft/draws.h"
#include "peft/mixture.h"
#include "peft/peft_config.h"
#include "peft/peft_form.h"

namespace graft::peft {
namespace {

constexpr const char* kXLoraRouter = "base_model.internal_xlora_classifier.layers.";

struct XLoraConfig {
  std::vector<std::string> adapters;
  bool enable_softmax = true, enable_softmax_topk = false, layerwise_scalings = false;
  double softmax_temperature = 1, xlora_dropout_p = 0.2, global_scaling_weight = 1;
  std::optional<int> top_k_lora;
  int xlora_depth = 1, xlora_size = 2048;

  void fields(configs::Fields& f) {
    f("adapters", adapters, "directories of the LoRAs to mix");
    f("enable_softmax", enable_softmax, "the scalings of a matrix sum to one");
    f("softmax_temperature", softmax_temperature, f.positive(), "lower: one LoRA more than others");
    f("layerwise_scalings", layerwise_scalings, "scalings of each matrix, not the same for all");
    f("top_k_lora", top_k_lora, f.at_least(1), "keep the largest scalings only; null: all");
    f("enable_softmax_topk", enable_softmax_topk, "then a softmax over those that are not zero");
    f("global_scaling_weight", global_scaling_weight, "of all that is added");
    f("xlora_depth", xlora_depth, f.range(1, 64), "layers of the router");
    f("xlora_size", xlora_size, f.range(1, 1 << 20), "its inner width, where there are several");
    f("xlora_dropout_p", xlora_dropout_p, f.range(0, 0.999), "between its layers");
  }
  static PeftForm peft_form() {
    return {.type = "XLORA",
            .fixed = {{"use_trainable_adapters", false}, {"scaling_pass_value", 0.0}},
            .inert = {"hidden_size"}};
  }
};

class XLoraRouter : public models::SequenceAdapter {
 public:
  XLoraRouter(const XLoraConfig& c, std::vector<int64_t> widths, kernels::Key random,
              std::shared_ptr<Mixture> mixture, at::Device device)
      : config_(c), random_(random), mixture_(std::move(mixture)) {
    for (size_t i = 0; i + 1 < widths.size(); ++i) {
      const int64_t in = widths[i], out = widths[i + 1];
      const std::string number = std::to_string(i);
      weights_.push_back(register_parameter(
          "weight" + number, draw_kaiming({out, in}, kernels::derive(random, i, 0), device)));
      biases_.push_back(register_parameter(
          "bias" + number, draw_uniform({out}, 1 / std::sqrt(static_cast<double>(in)),
                                        kernels::derive(random, i, 1), device)));
    }
  }
  bool looks() const override { return true; }
  models::Carry edit(models::Carry carry, const models::Pass& pass) override {
    return mixture_->add_scalings(std::move(carry), scalings_of(pass));
  }
  /// The numbers of its layers in PEFT's files, where activations and dropout have theirs.
  void list(AttachContext& context, int stage) const {
    for (size_t i = 0; i < weights_.size(); ++i) {
      const std::string layer = std::to_string(i * (config_.xlora_dropout_p > 0 ? 3 : 2));
      for (const auto& [leaf, value] : {std::pair(".weight", weights_[i]), {".bias", biases_[i]}}) {
        const std::string name = context.prefix + "router." + layer + leaf;
        context.params.add(Param{name, kXLoraRouter + layer + leaf, value, stage, stage});
      }
    }
  }

 private:
  Tensor scalings_of(const models::Pass& pass) const {
    GRAFT_ASSERT(pass.look_BTD.defined(), "X-LoRA needs the look of a trunk");
    Tensor x = pass.look_BTD.to(at::kFloat);
    for (size_t i = 0; i < weights_.size(); ++i) {
      x = at::linear(x, weights_[i], biases_[i]);
      if (i + 1 == weights_.size()) break;
      x = dropout(at::relu(x), config_.xlora_dropout_p, pass, kernels::derive(random_, i, 2));
    }
    Tensor s = x.unflatten(-1, {-1, std::ssize(config_.adapters)});
    if (config_.enable_softmax) s = at::softmax(s / config_.softmax_temperature, -1);
    if (config_.top_k_lora)
      s = s * at::zeros_like(s).scatter(-1, std::get<1>(s.topk(*config_.top_k_lora, -1)), 1);
    if (config_.enable_softmax_topk) {
      const Tensor none = s == 0;
      s = at::softmax(s.masked_fill(none, -std::numeric_limits<double>::infinity()), -1);
      s = s.masked_fill(none, 0);
    }
    return s * config_.global_scaling_weight;
  }

  XLoraConfig config_;
  kernels::Key random_;
  std::shared_ptr<Mixture> mixture_;
  std::vector<Tensor> weights_, biases_;
};

class XLora : public Method {
 public:
  void fields(configs::Fields& f) override { config_.fields(f); }
  bool starts_as_base() const override { return false; }
  std::vector<std::string> experts() const override { return config_.adapters; }
  void attach(AttachContext& context) override {
    const auto* input = context.slots.find_input();
    check_slots(context, input == nullptr ? 0 : 1, "the input, before the tokens");
    const auto count = std::ssize(config_.adapters);
    GRAFT_CHECK(count > 0, "peft: xlora: adapters = [], expected directories of trained LoRAs");
    GRAFT_CHECK(config_.top_k_lora.value_or(1) <= count,
                "peft: xlora: top_k_lora = ", config_.top_k_lora.value_or(1), " of ", count,
                " adapters");
    const auto mixture = std::make_shared<Mixture>();
    const int64_t matrices = attach_mixture(context, config_.adapters, mixture);
    hidden_size_ = context.info.hidden_size;
    std::vector<int64_t> widths(static_cast<size_t>(config_.xlora_depth), config_.xlora_size);
    widths.front() = hidden_size_;
    widths.push_back(count * (config_.layerwise_scalings ? matrices : 1));
    const auto router = std::make_shared<XLoraRouter>(
        config_, std::move(widths), site_key(context, "router"), mixture, context.device);
    input->slot->push(router);
    router->list(context, input->stage);
  }

  std::string peft_type() const override { return "XLORA"; }
  nlohmann::json to_peft_config(const SlotMap&) const override {
    XLoraConfig config = config_;
    nlohmann::json entries = write_peft_entries(
        XLoraConfig::peft_form(),
        configs::describe_section([&](configs::Fields& f) { config.fields(f); }));
    entries["hidden_size"] = hidden_size_;
    entries["adapters"] = nlohmann::json::object();
    for (size_t i = 0; i < config.adapters.size(); ++i)
      entries["adapters"][std::to_string(i)] = config.adapters[i];
    return entries;
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    const std::string first = kXLoraRouter + std::string("0.weight");
    GRAFT_CHECK(
        std::find(adapter.tensors.begin(), adapter.tensors.end(), first) != adapter.tensors.end(),
        ExitCode::kData, "adapter_model.safetensors: missing: ", first,
        "; PEFT 0.21.2 does not write the layers of the router whose numbers are names of "
        "its adapters, so what it saved cannot be used");
    SavedAdapter listed = adapter;
    auto& adapters = listed.config["adapters"];
    auto directories = nlohmann::ordered_json::array();
    for (size_t i = 0; i < adapters.size(); ++i) {
      GRAFT_CHECK(adapters.is_object() && adapters.contains(std::to_string(i)), ExitCode::kData,
                  "adapter_config.json: adapters = ", adapters.dump(),
                  R"(, expected directories under "0", "1" ...)");
      directories.push_back(adapters[std::to_string(i)]);
    }
    adapters = directories;
    PeftConfigReader config(listed);
    read_peft_entries(XLoraConfig::peft_form(), config, nullptr,
                      [this](configs::Fields& f) { config_.fields(f); });
  }

 private:
  XLoraConfig config_;
  int64_t hidden_size_ = 0;
};

}  // namespace

void register_xlora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<XLora>(); }});
}

}  // namespace graft::peft
