#include "peft/whole_tensors.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include "configs/check.h"

namespace graft::peft {
namespace {

/// y = x W'^T (+ b'), or rows of W', in the dtype of the frozen matrix's.
class WholeWeight : public models::LinearAdapter {
 public:
  WholeWeight(const LinearSite& site, at::Device device) : kind_(site.info.kind) {
    const bool embedding = kind_ == models::LinearKind::kEmbedding;
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    weight = register_parameter("weight", at::zeros({embedding ? site.info.in : site.info.out,
                                                     embedding ? site.info.out : site.info.in},
                                                    options));
    if (site.info.has_bias) bias = register_parameter("bias", at::zeros({site.info.out}, options));
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    if (kind_ == models::LinearKind::kEmbedding)
      return at::embedding(weight, x).to(base(x).scalar_type());
    const auto type = x.scalar_type();
    return at::linear(x, weight.to(type), bias.defined() ? bias.to(type) : bias);
  }
  bool mergeable() const override { return !bias.defined(); }
  Tensor merged(const Tensor& w) const override { return weight.to(w.scalar_type()); }
  bool replaces() const override { return true; }

  Tensor weight, bias;

 private:
  models::LinearKind kind_;
};

}  // namespace

WholeBias::WholeBias(const LinearSite& site, at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  bias_ = register_parameter("bias", at::zeros({site.info.out}, options));
  frozen_ = register_buffer("frozen_bias", at::zeros({site.info.out}, options));
}

Tensor WholeBias::forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) {
  const Tensor y = base(x);
  return y + (bias_ - frozen_).to(y.scalar_type());
}

Tensor WholeBias::merged_bias(const Tensor& b) const {
  return b + (bias_ - frozen_).to(b.scalar_type());
}

void WholeBias::initialize(const LinearSite& site, BaseWeights& base) {
  if (!site.info.has_bias) return;
  frozen_.copy_(base.bias(site));
  bias_.copy_(frozen_);
}

void WholeTensors::fields(configs::Fields& f) {
  f("modules_to_save", modules_to_save_,
    "matrices trained and saved whole, in the words of target_modules");
  if (bias_only_.empty()) return;
  f("bias", bias_, f.one_of({"none", "all", bias_only_}),
    "biases trained: of every linear, or of the adapted ones");
}

void WholeTensors::attach(AttachContext& context, const std::vector<const LinearSite*>& adapted,
                          const LearningRateFactor& factor) {
  if (!modules_to_save_.values.empty()) {
    for (const LinearSite* site : Targets{modules_to_save_}.resolve(context, "modules_to_save")) {
      for (const LinearSite* other : adapted) {
        GRAFT_CHECK(site != other, "peft: ", site->name,
                    " is both in target_modules and in modules_to_save");
      }
      add(context, *site, kFilePrefix, factor);
    }
  }
  const auto train_bias = [&](const LinearSite& site, bool is_adapted) {
    const bool is_whole = std::any_of(weights_.begin(), weights_.end(),
                                      [&](const Copy& copy) { return copy.site == &site; });
    const bool is_classifiers = context.info.task != models::Task::kCausalLm && site.role == "head";
    if (!site.info.has_bias || is_whole || is_classifiers) return;  // that head is trained whole
    biases_.push_back({&site, std::make_shared<WholeBias>(site, context.device)});
    attach_linear(context, site, biases_.back().adapter,
                  {{"bias", is_adapted ? "base_layer.bias" : "bias"}}, factor);
  };
  if (bias_ == bias_only_) {
    for (const LinearSite* site : adapted) train_bias(*site, true);
  } else if (bias_ == "all") {
    for (const LinearSite& site : context.slots.linears) {
      train_bias(site, std::find(adapted.begin(), adapted.end(), &site) != adapted.end());
    }
  }
}

void WholeTensors::add(AttachContext& context, const LinearSite& site, std::string_view prefix,
                       const LearningRateFactor& factor) {
  weights_.push_back({&site, std::make_shared<WholeWeight>(site, context.device)});
  site.slot->push(weights_.back().adapter);
  list_tensors(context, *weights_.back().adapter,
               {site.name, std::string(prefix) + site.hf_path, site.stage}, {}, factor);
}

void WholeTensors::initialize(BaseWeights& base) {
  const at::NoGradGuard no_grad;
  for (const Copy& copy : weights_) {
    auto& whole = static_cast<WholeWeight&>(*copy.adapter);
    whole.weight.copy_(base.weight(*copy.site));
    if (whole.bias.defined()) whole.bias.copy_(base.bias(*copy.site));
  }
  for (const Copy& copy : biases_) {
    static_cast<WholeBias&>(*copy.adapter).initialize(*copy.site, base);
  }
}

nlohmann::json WholeTensors::to_peft_config(const SlotMap& slots) const {
  nlohmann::json config = {{"modules_to_save", nullptr}};
  if (!bias_only_.empty()) config["bias"] = bias_;
  std::vector<const LinearSite*> sites;
  for (const Copy& copy : weights_) sites.push_back(copy.site);
  if (!sites.empty()) config["modules_to_save"] = hf_targets(sites, slots);
  return config;
}

void WholeTensors::from_peft_config(PeftConfigReader& config) {
  modules_to_save_ = {};
  modules_to_save_.values = config.whole_modules();
  config.ignore({"bias"});
  if (!bias_only_.empty()) {
    config.get("bias", bias_);
  } else {
    const auto& bias = config.entry("bias");
    GRAFT_CHECK(bias.is_null() || bias == "none", ExitCode::kData,
                "adapter_config.json: bias = ", bias.dump(), ", expected \"none\"");
  }
}

}  // namespace graft::peft
