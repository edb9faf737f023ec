// (IA)^3: y = l * (W x + b); in feed-forward modules y = W (l * x) + b.
//                               Liu et al. 2022, arXiv:2205.05638, sec. 3.3
// Trains l [out, 1], in feed-forward modules [1, in]; ones: the model is unchanged at step 0.
// Mergeable where l scales the input or no bias. Fields and files are those of HF PEFT's IA3Config,
// which calls a module feed-forward by its name. The paper scales keys, values and the inner
// activations of the MLP, the input of mlp.down here: those are the defaults. Its T5 has no biases;
// PEFT scales them too, LyCORIS's ia3 does not, unless its layers are bypassed (scale_bias: false,
// which where there is a bias is not PEFT's; it stores l - 1).
#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <algorithm>

#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct Ia3Config {
  Targets targets{.modules = {"attn.k", "attn.v", "mlp.down"}};
  configs::StringOrList feedforward_modules = {"mlp.down"};
  bool scale_bias = true;

  void fields(configs::Fields& f) {
    f("feedforward_modules", feedforward_modules,
      "of the adapted slots, those whose input is scaled, in the words of target_modules");
    f("scale_bias", scale_bias, "l (W x + b); false: l (W x) + b, as LyCORIS");
  }
  static PeftForm peft_form() {
    return {.type = "IA3", .inert = {"init_ia3_weights"}, .ours = {"scale_bias"}};
  }
  bool is_pefts() const { return scale_bias; }
  bool is_feedforward(const LinearSite& site) const {
    const auto& words = feedforward_modules.values;
    return std::any_of(words.begin(), words.end(),
                       [&](const std::string& word) { return is_meant(word, site); });
  }
};

class Ia3Linear : public models::LinearAdapter {
 public:
  Ia3Linear(const Ia3Config& c, const LinearSite& site, kernels::Key, at::Device device)
      : on_input_(c.is_feedforward(site)), scales_bias_(c.scale_bias && site.info.has_bias) {
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    l_ = register_parameter("l", on_input_ ? at::ones({1, site.info.in}, options)
                                           : at::ones({site.info.out, 1}, options));
    if (site.info.has_bias && !c.scale_bias)
      bias_ = register_buffer("bias", at::zeros({site.info.out}, options));
  }
  static std::vector<Leaf> leaves() { return {{"l", "ia3_l"}}; }
  void initialize(const Ia3Config&, const LinearSite& site, BaseWeights& base) {
    if (bias_.defined()) bias_.copy_(base.bias(site));
  }

  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    if (on_input_) return base(scaled(x));
    const Tensor y = base(x);
    return bias_.defined() ? (y + (l_.view({-1}) - 1) * (y - bias_)).to(y.scalar_type())
                           : scaled(y);
  }
  bool mergeable() const override { return on_input_ || !scales_bias_; }
  Tensor merged(const Tensor& w) const override { return (w * l_).to(w.scalar_type()); }

 private:
  /// In float32, because in bfloat16 l has 1 and then nothing before 1.008.
  Tensor scaled(const Tensor& t) const { return (t * l_.view({-1})).to(t.scalar_type()); }

  bool on_input_, scales_bias_;
  Tensor l_, bias_;
};

class Ia3 : public LinearMethod<Ia3Config, Ia3Linear> {
 public:
  /// PEFT looks for each feed-forward name among those of target_modules.
  nlohmann::json to_peft_config(const SlotMap& slots) const override {
    std::vector<const LinearSite*> scaled_on_input;
    for (const LinearSite* site : sites_) {
      if (config_.is_feedforward(*site)) scaled_on_input.push_back(site);
    }
    nlohmann::json config = LinearMethod::to_peft_config(slots);
    const auto all = hf_targets(sites_, slots), inner = hf_targets(scaled_on_input, slots);
    config["feedforward_modules"] = inner;
    if (std::includes(all.begin(), all.end(), inner.begin(), inner.end())) return config;
    for (const char* list : {"target_modules", "feedforward_modules"})
      config[list] = nlohmann::json::array();
    for (const LinearSite* site : sites_) config["target_modules"].push_back(site->hf_path);
    for (const LinearSite* site : scaled_on_input)
      config["feedforward_modules"].push_back(site->hf_path);
    return config;
  }
};

}  // namespace

void register_ia3(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Ia3>(); }});
}

}  // namespace graft::peft
