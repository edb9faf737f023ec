// OSF: y = (W + U S V - U0 S0 V0) x + b, U0 S0 V0 the part of W = U S V^T below its effective_rank
// largest singular values: what the base knows best stays.                         arXiv:2504.07097
// Trains U [out, k], S [k] and V [k, in], k the other directions, from U0, S0 and V0: the model is
// unchanged at step 0. The gradients of U and V are projected so that they leave out the directions
// that stay. Mergeable. U0, S0 and V0 are taken from the base at the start and not saved. Fields
// and files are those of HF PEFT's OSFConfig, where an effective_rank below 1 is a share of all.
#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <algorithm>

#include "configs/check.h"
#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct OsfConfig {
  Targets targets;
  std::optional<double> effective_rank;
  std::map<std::string, double> rank_pattern;
  bool init_weights = true;

  void fields(configs::Fields& f) {
    f("effective_rank", effective_rank, f.positive(),
      "directions that stay: so many, or below 1 a share; null: half");
    f("rank_pattern", rank_pattern, f.positive(), "other effective_rank by slot, suffix or glob");
    f("init_weights", init_weights, "false: U, S and V from N(0, 1), not as the base");
  }
  static PeftForm peft_form() { return {.type = "OSF", .inert = {"target_svd_config"}}; }
  bool starts_as_base() const { return init_weights; }
  /// Directions of a slot that are trained.
  int64_t count(const LinearSite& site) const {
    const int64_t all = std::min(site.info.in, site.info.out);
    const double value = pattern_value(rank_pattern, site, effective_rank.value_or(0.5));
    const double kept = value < 1 ? value * static_cast<double>(all) : value;
    GRAFT_CHECK(kept >= 1 && kept < static_cast<double>(all), "peft: osf: ", site.name,
                ": effective_rank = ", value, " keeps ", static_cast<int64_t>(kept), " of ", all,
                " singular directions; from 1 to ", all - 1, " can stay");
    return all - static_cast<int64_t>(kept);
  }
};

class OsfLinear : public models::LinearAdapter {
 public:
  OsfLinear(const OsfConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : more_outputs_(site.info.out > site.info.in), more_inputs_(site.info.in > site.info.out) {
    const int64_t k = c.count(site), kept = std::min(site.info.in, site.info.out) - k;
    const auto list = [&](const char* name, at::IntArrayRef shape, int number, Tensor& frozen) {
      const Tensor start = draw_normal(shape, 1, kernels::derive(random, number), device);
      frozen = at::zeros_like(start);
      return register_parameter(name, start);
    };
    u_ = list("u", {site.info.out, k}, 0, u0_);
    s_ = list("s", {k}, 1, s0_);
    v_ = list("v", {k, site.info.in}, 2, v0_);
    if (more_outputs_) kept_ = at::zeros({site.info.out, kept}, u0_.options());
    if (more_inputs_) kept_ = at::zeros({kept, site.info.in}, u0_.options());
  }
  static std::vector<Leaf> leaves() {
    return {{"u", "osf_svd_params.U_low"},
            {"s", "osf_svd_params.S_low"},
            {"v", "osf_svd_params.V_low"}};
  }
  void initialize(const OsfConfig& c, const LinearSite& site, BaseWeights& base) {
    const auto [u, s, vh] = at::linalg_svd(base.weight(site), /*full_matrices=*/false);
    const int64_t kept = s.size(0) - s0_.size(0);
    u0_.copy_(u.slice(1, kept)), s0_.copy_(s.slice(0, kept)), v0_.copy_(vh.slice(0, kept));
    if (more_outputs_) kept_.copy_(u.slice(1, 0, kept));
    if (more_inputs_) kept_.copy_(vh.slice(0, 0, kept));
    if (c.init_weights) u_.copy_(u0_), s_.copy_(s0_), v_.copy_(v0_);
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    const Tensor y = base(x);
    const auto product = [&](const Tensor& u, const Tensor& s, const Tensor& v) {
      return at::linear(at::linear(x, v.to(x.scalar_type())), (u * s).to(x.scalar_type()));
    };  // one way for both: at the start they are equal bit for bit
    return y + (product(u_, s_, v_) - product(u0_, s0_, v0_)).to(y.scalar_type());
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + ((u_ * s_).mm(v_) - (u0_ * s0_).mm(v0_)).to(w.scalar_type());
  }
  /// Takes the kept directions out of the gradients. What is not kept of a square basis is spanned
  /// by the others.
  void project_gradients() const {
    const Tensor du = u_.mutable_grad(), dv = v_.mutable_grad();
    du.copy_(more_outputs_ ? du - kept_.mm(kept_.t().mm(du)) : u0_.mm(u0_.t().mm(du)));
    dv.copy_(more_inputs_ ? dv - dv.mm(kept_.t()).mm(kept_) : dv.mm(v0_.t()).mm(v0_));
  }

 private:
  bool more_outputs_, more_inputs_;
  Tensor u_, s_, v_, u0_, s0_, v0_;
  Tensor kept_;  ///< of the longer side
};

class Osf : public LinearMethod<OsfConfig, OsfLinear> {
 public:
  void after_reduce(const StepInfo&) override {
    const at::NoGradGuard no_grad;
    for (const auto& adapter : adapters_) adapter->project_gradients();
  }
  /// To PEFT a number with a point is a share.
  nlohmann::json to_peft_config(const SlotMap& slots) const override {
    nlohmann::json config = LinearMethod::to_peft_config(slots);
    const auto whole = [](nlohmann::json& value) {
      if (value.is_number() && value >= 1) value = value.get<int64_t>();
    };
    whole(config["effective_rank"]);
    for (auto& value : config["rank_pattern"]) whole(value);
    return config;
  }
  /// PEFT finds a key of this rank_pattern anywhere in a module's path.
  void from_peft_config(const SavedAdapter& adapter) override {
    SavedAdapter anchored = adapter;
    auto& pattern = anchored.config["rank_pattern"];
    auto found = nlohmann::ordered_json::object();
    if (pattern.is_object()) {
      for (const auto& [key, value] : pattern.items()) found[".*(" + key + ").*"] = value;
    }
    pattern = found;
    LinearMethod::from_peft_config(anchored);
  }
};

}  // namespace

void register_osf(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Osf>(); }});
}

}  // namespace graft::peft
