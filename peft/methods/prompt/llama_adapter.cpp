// LLaMA-Adapter: y = softmax(q k^T / sqrt(K)) v + g softmax(q k_P^T / sqrt(K)) v_P.
//                                                  Zhang et al. 2023, arXiv:2303.16199
// Trains in each of the top adapter_layers layers a prompt P [1, adapter_len, D] and a gate g [1];
// k_P and v_P are the layer's own projections of P, neither normed nor rotated. The two softmaxes
// are separate. P is N(0, 1), g zero: the model is unchanged at step 0, and P moves from the second
// step on. Not mergeable. Fields and files are those of HF PEFT's AdaptionPromptConfig. The paper's
// code has one gate a head and applies tanh to it (gate: heads, g [1, H, 1, 1]), PEFT one a layer
// without, the default: PEFT's files hold nothing else. PEFT adds
// through a second product with W_o: the same where W_o has no bias, as in all models it supports
// (Llama, Mistral).
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "kernels/random/random.h"
#include "peft/attach.h"
#include "peft/peft_config.h"
#include "peft/peft_form.h"

namespace graft::peft {
namespace {

struct LlamaAdapterConfig {
  int adapter_len = 10;
  std::optional<int> adapter_layers;
  std::string gate = "layer";

  void fields(configs::Fields& f) {
    f("adapter_len", adapter_len, f.range(1, 65536), "rows of each layer's prompt");
    f("adapter_layers", adapter_layers, f.range(1, 65536),
      "layers with a prompt, from the top; null: all");
    f("gate", gate, f.one_of({"layer", "heads"}),
      "layer: one number, as PEFT; heads: tanh of one a head, as the paper's code");
  }
  static PeftForm peft_form() { return {.type = "ADAPTION_PROMPT", .ours = {"gate"}}; }
};

/// Reads the prompt's keys and values, which the projections below left.
class LlamaAdapterCore : public models::AttentionAdapter {
 public:
  /// @param heads  gates of their own, or 0: one for all
  LlamaAdapterCore(int64_t length, int64_t width, int64_t heads, kernels::Key random,
                   at::Device device) {
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    const Tensor prompt = at::empty({1, length, width}, options);
    kernels::normal(prompt, random);
    prompt_ = register_parameter("prompt", prompt);
    gate_ = register_parameter(
        "gate", heads == 0 ? at::zeros({1}, options) : at::zeros({1, heads, 1, 1}, options));
  }
  Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const Core& core,
                 const models::Pass&) override {
    const int64_t heads = k.size(1), group = q.size(1) / heads, head_dim = q.size(3);
    const Tensor keys = by_head(std::exchange(keys_, {}), heads, head_dim);
    const Tensor values = by_head(std::exchange(values_, {}), heads, head_dim);
    const Tensor q_BHGLK = q.unflatten(1, {heads, group});
    const Tensor scores =
        q_BHGLK.matmul(keys.transpose(-1, -2)) / std::sqrt(static_cast<double>(head_dim));
    const Tensor gate = gate_.dim() == 1 ? gate_ : gate_.view({heads, group, 1, 1}).tanh();
    const Tensor weights = (gate * scores.to(at::kFloat).softmax(-1)).to(q.scalar_type());
    return core(q, k, v) + weights.matmul(values).flatten(1, 2);
  }
  const Tensor& prompt() const { return prompt_; }
  Tensor keys_, values_;  ///< [1, P, heads K]; of the pass that is under way

 private:
  /// [1, heads, 1, P, K]
  static Tensor by_head(const Tensor& t, int64_t heads, int64_t head_dim) {
    return t.view({1, -1, heads, head_dim}).transpose(1, 2).unsqueeze(2);
  }
  Tensor prompt_, gate_;
};

/// Runs the prompt through a projection while its weights are at hand.
class LlamaAdapterProjection : public models::LinearAdapter {
 public:
  LlamaAdapterProjection(std::shared_ptr<LlamaAdapterCore> core, Tensor LlamaAdapterCore::*result)
      : core_(std::move(core)), result_(result) {}
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    core_.get()->*result_ = base(core_->prompt().to(x.scalar_type()));
    return base(x);
  }

 private:
  std::shared_ptr<LlamaAdapterCore> core_;
  Tensor LlamaAdapterCore::*result_;
};

class LlamaAdapter : public Method {
 public:
  void fields(configs::Fields& f) override { config_.fields(f); }
  void attach(AttachContext& context) override {
    const auto& cores = context.slots.attentions;
    check_slots(context, cores.size(), "attention");
    const int count = config_.adapter_layers.value_or(static_cast<int>(cores.size()));
    GRAFT_CHECK(count <= static_cast<int>(cores.size()),
                "peft: llama_adapter: adapter_layers = ", count, ", but this model has ",
                cores.size(), " layers");
    config_.adapter_layers = count;
    for (size_t i = cores.size() - static_cast<size_t>(count); i < cores.size(); ++i) {
      const std::string& name = cores[i].name;  // block.3.attn.core
      const std::string attention = name.substr(0, name.rfind('.'));
      const LinearSite* k = context.slots.find_linear(attention + ".k");
      const LinearSite* v = context.slots.find_linear(attention + ".v");
      GRAFT_CHECK(k != nullptr && v != nullptr, "peft: llama_adapter: ", attention,
                  " has no projections of keys and values");
      const LinearSite* q = context.slots.find_linear(attention + ".q");
      const int64_t heads = config_.gate == "heads" ? q->info.out / context.info.head_dim : 0;
      auto core = std::make_shared<LlamaAdapterCore>(config_.adapter_len, k->info.in, heads,
                                                     site_key(context, name), context.device);
      cores[i].slot->push(core);
      k->slot->push(std::make_shared<LlamaAdapterProjection>(core, &LlamaAdapterCore::keys_));
      v->slot->push(std::make_shared<LlamaAdapterProjection>(core, &LlamaAdapterCore::values_));
      const std::string path = k->hf_path.substr(0, k->hf_path.rfind('.'));
      target_ = path.substr(path.rfind('.') + 1);
      list_tensors(context, *core, {name, "base_model.model." + path, cores[i].stage},
                   {{"prompt", "adaption_prompt"}, {"gate", "adaption_gate"}});
    }
  }

  std::string peft_type() const override {
    return config_.gate == "layer" ? LlamaAdapterConfig::peft_form().type : "";
  }
  nlohmann::json to_peft_config(const SlotMap&) const override {
    nlohmann::json config =
        write_peft_entries(LlamaAdapterConfig::peft_form(), configs::describe(config_));
    config["target_modules"] = target_;
    return config;
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    PeftConfigReader config(adapter);
    config.ignore({"target_modules"});
    read_peft_entries(LlamaAdapterConfig::peft_form(), config, nullptr,
                      [&](configs::Fields& f) { config_.fields(f); });
  }

 private:
  LlamaAdapterConfig config_;
  std::string target_;
};

}  // namespace

void register_llama_adapter(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<LlamaAdapter>(); }});
}

}  // namespace graft::peft
