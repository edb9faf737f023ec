// LayerNorm tuning: y = g * x / rms(x), g trained.       Zhao et al. 2023, arXiv:2312.11420
// Trains the gain g [D] of each norm, a copy of the base's: the model is unchanged at step 0.
// Mergeable: the gain is not quantised. Fields and files are those of HF PEFT's LNTuningConfig,
// which copies the whole norm; norms of this family have no bias. The norms of Qwen3's queries and
// keys (attn.q_norm, attn.k_norm) are trained if named.
#include <ATen/ATen.h>

#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct LayernormTuningConfig {
  Targets targets{.modules = {"attn_norm", "mlp_norm", "final_norm"}, .gains = true};

  void fields(configs::Fields&) {}
  static PeftForm peft_form() { return {.type = "LN_TUNING"}; }
};

class LayernormTuningGain : public models::LinearAdapter {
 public:
  LayernormTuningGain(const LayernormTuningConfig&, const LinearSite& site, kernels::Key,
                      at::Device device) {
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    gain_ = register_parameter("gain", at::ones({site.info.out}, options));
  }
  static std::vector<Leaf> leaves() { return {{"gain", "ln_tuning_layers.weight"}}; }
  void initialize(const LayernormTuningConfig&, const LinearSite& site, BaseWeights& base) {
    gain_.copy_(base.weight(site));
  }

  /// The norm asks for merged() instead.
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    return base(x);
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override { return gain_.to(w.scalar_type()); }
  bool replaces() const override { return true; }

 private:
  Tensor gain_;
};

}  // namespace

void register_layernorm_tuning(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add(
      {facts.name, facts.summary, [] {
         return std::make_unique<LinearMethod<LayernormTuningConfig, LayernormTuningGain>>();
       }});
}

}  // namespace graft::peft
