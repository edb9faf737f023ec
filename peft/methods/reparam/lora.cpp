// LoRA: y = W x + s B A x, s = alpha / r.              Hu et al. 2021, arXiv:2106.09685, eq. 3
// rsLoRA: s = alpha / sqrt(r).                         Kalajdzievski 2023, arXiv:2312.03732
// Trains A [r, in] (Kaiming-uniform, a = sqrt 5) and B [out, r] (zeros): the model is unchanged at
// step 0. On an embedding A [r, V] is zero and B [D, r] normal. Mergeable. Fields and files are
// those of HF PEFT's LoraConfig.
#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <cmath>
#include <map>

#include "configs/check.h"
#include "kernels/lowrank/lowrank.h"
#include "kernels/random/random.h"
#include "peft/linear_method.h"
#include "peft/peft_config.h"
#include "peft/whole_tensors.h"

namespace graft::peft {
namespace {

struct LoraConfig {
  Targets targets;
  int r = 8;
  double lora_alpha = 8;
  double lora_dropout = 0;
  bool use_rslora = false;
  std::map<std::string, int> rank_pattern;
  std::map<std::string, double> alpha_pattern;
  WholeTensors whole;

  void fields(configs::Fields& f) {
    targets.fields(f);
    f("r", r, f.range(1, 4096), "rank, the inner size");
    f("lora_alpha", lora_alpha, alpha_bound(), "the output is scaled by lora_alpha / r");
    f("lora_dropout", lora_dropout, f.at_least(0).below(1), "probability, on the adapter's input");
    f("use_rslora", use_rslora, "scale by lora_alpha / sqrt(r) instead");
    f("rank_pattern", rank_pattern, f.range(1, 4096), "other ranks by slot, suffix or glob");
    f("alpha_pattern", alpha_pattern, alpha_bound(), "other lora_alpha by slot, suffix or glob");
    whole.fields(f);
  }
  static configs::Bound alpha_bound() {
    return configs::Fields::positive().at_most(1e30);  // alpha / r is a float32
  }
  int rank(const LinearSite& site) const { return pattern_value(rank_pattern, site, r); }
  double scale(const LinearSite& site) const {
    const double alpha = pattern_value(alpha_pattern, site, lora_alpha);
    return alpha / (use_rslora ? std::sqrt(rank(site)) : rank(site));
  }
};

class LoraLinear : public models::LinearAdapter {
 public:
  LoraLinear(const LoraConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : scale_(c.scale(site)), dropout_(c.lora_dropout), random_(random) {
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    const int r = c.rank(site);
    Tensor a = at::empty({r, site.info.in}, options);
    kernels::uniform(a, random);  // Kaiming-uniform with a = sqrt 5: within 1 / sqrt(in)
    a.mul_(2).sub_(1).mul_(1 / std::sqrt(static_cast<double>(site.info.in)));
    a_ = register_parameter("lora_a", a);
    b_ = register_parameter("lora_b", at::zeros({site.info.out, r}, options));
  }
  static std::vector<Leaf> leaves() {
    return {{"lora_a", "lora_A.weight"}, {"lora_b", "lora_B.weight"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    if (dropout_ == 0 || !pass.training) return kernels::lowrank_add(base(x), x, a_, b_, scale_);
    const auto key = kernels::derive(pass.random, random_.stream);
    const Tensor mask = at::empty(x.sizes(), x.options().dtype(at::kFloat));
    kernels::dropout_mask(mask, key, dropout_);
    return kernels::lowrank_add(base(x), x * mask.to(x.scalar_type()), a_, b_, scale_);
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + (scale_ * b_.mm(a_)).to(w.scalar_type());
  }

 private:
  double scale_, dropout_;
  kernels::Key random_;
  Tensor a_, b_;
};

/// PEFT ignores lora_dropout on embeddings; so do we.
class LoraEmbedding : public models::LinearAdapter {
 public:
  LoraEmbedding(const LoraConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : scale_(c.scale(site)) {
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    const int r = c.rank(site);
    Tensor b = at::empty({site.info.out, r}, options);
    kernels::normal(b, random);
    a_ = register_parameter("lora_embedding_a", at::zeros({r, site.info.in}, options));
    b_ = register_parameter("lora_embedding_b", b);
  }
  static std::vector<Leaf> leaves() {
    return {{"lora_embedding_a", "lora_embedding_A"}, {"lora_embedding_b", "lora_embedding_B"}};
  }
  Tensor forward(const Tensor& ids, const models::LinearOp& base, const models::Pass&) override {
    const Tensor y = base(ids);
    return y + (at::embedding(a_.t(), ids).matmul(b_.t()) * scale_).to(y.scalar_type());
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + (scale_ * a_.t().mm(b_.t())).to(w.scalar_type());
  }

 private:
  double scale_;
  Tensor a_, b_;
};

class Lora : public LinearMethod<LoraConfig, LoraLinear> {
 public:
  void attach(AttachContext& context) override {
    sites_ = config_.targets.resolve(context.slots);
    check_pattern(keys(config_.rank_pattern), sites_, "rank_pattern");
    check_pattern(keys(config_.alpha_pattern), sites_, "alpha_pattern");
    for (const LinearSite* site : sites_) {
      const kernels::Key key = site_key(context, *site);
      if (site->info.kind == models::LinearKind::kEmbedding) {
        attach_linear(context, *site,
                      std::make_shared<LoraEmbedding>(config_, *site, key, context.device),
                      LoraEmbedding::leaves());
      } else {
        attach_linear(context, *site,
                      std::make_shared<LoraLinear>(config_, *site, key, context.device),
                      LoraLinear::leaves());
      }
    }
    config_.whole.attach(context, sites_);
  }
  void initialize(BaseWeights& base) override { config_.whole.initialize(base); }
  std::string peft_type() const override { return "LORA"; }

  nlohmann::json to_peft_config(const SlotMap& slots) const override {
    nlohmann::json config = {{"r", config_.r},
                             {"lora_alpha", config_.lora_alpha},
                             {"lora_dropout", config_.lora_dropout},
                             {"use_rslora", config_.use_rslora},
                             {"use_dora", false},
                             {"fan_in_fan_out", false},
                             {"init_lora_weights", true},
                             {"target_modules", hf_targets(sites_, slots)},
                             {"rank_pattern", nlohmann::json::object()},
                             {"alpha_pattern", nlohmann::json::object()}};
    for (const LinearSite* site : sites_) {
      if (config_.rank(*site) != config_.r)
        config["rank_pattern"][site->hf_path] = config_.rank(*site);
      const double alpha = pattern_value(config_.alpha_pattern, *site, config_.lora_alpha);
      if (alpha != config_.lora_alpha) config["alpha_pattern"][site->hf_path] = alpha;
    }
    config.update(config_.whole.to_peft_config(slots));
    return config;
  }

  void from_peft_config(const SavedAdapter& adapter) override {
    PeftConfigReader config(adapter);
    config.get("r", config_.r);
    config.get("lora_alpha", config_.lora_alpha);
    config.get("lora_dropout", config_.lora_dropout);
    config.get("use_rslora", config_.use_rslora);
    config.get_targets({"lora_A.weight", "lora_embedding_A"}, config_.targets);
    config.get_pattern("rank_pattern", config_.targets, config_.rank_pattern);
    config.get_pattern("alpha_pattern", config_.targets, config_.alpha_pattern);
    config_.whole.from_peft_config(config);
    const nlohmann::ordered_json& init = config.entry("init_lora_weights");
    // Any other (pissa, olora ...) is taken out of the base's matrices: the base in the files is
    // not the one below it.
    GRAFT_CHECK(init.is_null() || init.is_boolean() || init == "gaussian" || init == "eva" ||
                    init == "orthogonal",
                ExitCode::kData, "adapter_config.json: init_lora_weights = ", init.dump(),
                " changes the base and is not supported; convert the adapter to plain LoRA");
    config.ignore({"loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
                   "megatron_core", "qalora_group_size", "ensure_weight_tying"});
    config.refuse_the_rest();
  }
};

}  // namespace

void register_lora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Lora>(); }});
}

}  // namespace graft::peft
