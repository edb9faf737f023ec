// KaSA: y = (W - U0 S0 V0) x + b + s B diag(d) A x, U0 S0 V0 the part of W that belongs to its r
// smallest singular values, which are taken for noise; s = alpha / r, or alpha / sqrt(r).
//   Wang et al. 2024, "KaSA: Knowledge-Aware Singular-Value Adaptation", arXiv:2412.06071, eq. 5-11
// Trains A [r, in] (Kaiming-uniform, a = sqrt 5), B [out, r] (zeros) and d [r] (normal): the model
// starts as the base without that part. U0, S0 and V0 are taken from the base at the start and not
// saved. Mergeable. The loss gets beta |d|^2 + gamma (|B^T B - I| + |A A^T - I|) of each slot, as
// its gradient, once a step. Fields and files are those of HF PEFT's LoRA with a kasa_config, where
// beta and gamma stand; PEFT leaves it to its user to add the terms (LoraModel._get_kasa_loss).
#include <ATen/ATen.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/lora_fields.h"
#include "peft/rank_scores.h"

namespace graft::peft {
namespace {

struct KasaConfig {
  Targets targets;
  int r = 8;
  double lora_alpha = 8, lora_dropout = 0;
  bool use_rslora = false;
  std::map<std::string, int> rank_pattern;
  std::map<std::string, double> alpha_pattern;
  double beta = 1e-4, gamma = 1e-3;

  void fields(configs::Fields& f) {
    const configs::Bound alpha = f.positive().at_most(1e30);
    f("r", r, f.range(1, 4096), "rank, and the singular values that are dropped");
    f("lora_alpha", lora_alpha, alpha, "the output is scaled by lora_alpha / r");
    f("lora_dropout", lora_dropout, f.at_least(0).below(1), "probability, on the adapter's input");
    f("use_rslora", use_rslora, "scale by lora_alpha / sqrt(r) instead");
    f("rank_pattern", rank_pattern, f.range(1, 4096), "other ranks by slot, suffix or glob");
    f("alpha_pattern", alpha_pattern, alpha, "other lora_alpha by slot, suffix or glob");
    f("beta", beta, f.at_least(0).at_most(1e6), "how small d is to be");
    f("gamma", gamma, f.at_least(0).at_most(1e6), "how orthogonal A and B are to be");
  }
  static PeftForm peft_form() {
    return {.type = "LORA",
            .bias_only = "lora_only",
            .inert = {"runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
                      "init_lora_weights"},
            .ours = {"beta", "gamma"}};
  }
  bool starts_as_base() const { return false; }
  int64_t rank(const LinearSite& site) const { return pattern_value(rank_pattern, site, r); }
  double scale(const LinearSite& site) const {
    const auto n = static_cast<double>(rank(site));
    return pattern_value(alpha_pattern, site, lora_alpha) / (use_rslora ? std::sqrt(n) : n);
  }
};

class KasaLinear : public models::LinearAdapter {
 public:
  KasaLinear(const KasaConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : scale_(c.scale(site)), dropout_(c.lora_dropout), random_(random) {
    const int64_t r = c.rank(site), in = site.info.in, out = site.info.out;
    GRAFT_CHECK(r < std::min(in, out), "peft: kasa: ", site.name, ": r = ", r,
                " leaves nothing of its ", std::min(in, out), " singular values");
    a_ = register_parameter("lora_a", draw_kaiming({r, in}, random, device));
    b_ = register_parameter("lora_b", at::zeros({out, r}, a_.options()));
    diag_ =
        register_parameter("lora_diag", draw_normal({r}, 1, kernels::derive(random, 1), device));
    dropped_a_ = at::zeros({r, in}, a_.options()).detach();
    dropped_b_ = at::zeros({out, r}, a_.options()).detach();
  }
  static std::vector<Leaf> leaves() {
    return {{"lora_a", "lora_A.weight"}, {"lora_b", "lora_B.weight"}, {"lora_diag", "lora_diag"}};
  }
  void initialize(const KasaConfig&, const LinearSite& site, BaseWeights& base) {
    const auto [u, s, vh] = at::linalg_svd(base.weight(site), /*full_matrices=*/false);
    const int64_t kept = s.size(0) - diag_.size(0);
    dropped_b_.copy_(u.slice(1, kept) * s.slice(0, kept));
    dropped_a_.copy_(vh.slice(0, kept));
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    const Tensor y = kernels::lowrank_add(base(x), x, dropped_a_, dropped_b_, -1);
    return kernels::lowrank_add(y, dropout(x, dropout_, pass, random_), down(), b_, scale_);
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + (scale_ * b_.mm(down()) - dropped_b_.mm(dropped_a_)).to(w.scalar_type());
  }
  void add_penalty(double beta, double gamma) const {
    diag_.grad().add_(diag_, 2 * beta);
    add_orthogonality(a_, b_, diag_.size(0), gamma);
  }

 private:
  Tensor down() const { return diag_.unsqueeze(1) * a_; }

  double scale_, dropout_;
  kernels::Key random_;
  Tensor a_, b_, diag_, dropped_a_, dropped_b_;
};

class Kasa : public LinearMethod<KasaConfig, KasaLinear> {
 public:
  bool is_in(const SavedAdapter& adapter) const override {
    const auto found = adapter.config.find("kasa_config");
    return found != adapter.config.end() && found->is_object();
  }
  void after_reduce(const StepInfo&) override {
    const at::NoGradGuard no_grad;
    for (const auto& adapter : adapters_) adapter->add_penalty(config_.beta, config_.gamma);
  }
  nlohmann::json to_peft_config(const SlotMap& slots) const override {
    nlohmann::json config = LinearMethod::to_peft_config(slots);
    config["kasa_config"] = {{"beta", config_.beta}, {"gamma", config_.gamma}};
    return config;
  }
  void from_peft_config(const SavedAdapter& adapter) override {
    SavedAdapter other = LoraFields::with_known_start(adapter);
    for (const char* name : {"beta", "gamma"}) {
      const auto& section = other.config["kasa_config"];
      if (section.contains(name)) other.facts[name] = section.at(name);
    }
    other.config.erase("kasa_config");
    LinearMethod::from_peft_config(other);
  }
};

}  // namespace

void register_kasa(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Kasa>(); }});
}

}  // namespace graft::peft
