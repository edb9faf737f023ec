// DEFT: y = W x + Q (s R - P'^T W) x + b: a part of W is taken out and another put in its place.
//   Kumar et al. 2025, NeurIPS 2025; the removal alone (para): Chen et al. 2024,
//   arXiv:2406.05641
// decomposition_method relu: Q = P, P' = max(P, 0); qr: Q = P' with orthonormal columns that span
// P. s = alpha / r, or 1 without alpha. Trains P [out, r] (normal, 0.02) and, unless para, R [r,
// in]. Init: s R = P'^T W, so that the update is zero up to rounding (the two terms are computed
// apart, so step 0 is not the base bit for bit); init_weights false: R normal; para takes out at
// once. r is at most out. With qr the columns of Q have LAPACK's signs, as in PEFT, so s Q R jumps
// where one turns. Mergeable. Computed in float32 from the base's output, W itself is not needed.
// Fields and files are those of HF PEFT's DeftConfig.
#include <ATen/ATen.h>

#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct DeftConfig {
  Targets targets;
  int r = 8;
  std::string decomposition_method = "relu";
  double init_scale = 1;
  std::optional<double> alpha;
  bool para = false;
  double deft_dropout = 0;
  bool init_weights = true;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "columns of P");
    f("decomposition_method", decomposition_method, f.one_of({"relu", "qr"}),
      "how Q and P' come from P");
    f("init_scale", init_scale, f.at_least(0).at_most(1e30),
      "with init_weights false: R has a deviation of 0.02 times this");
    f("alpha", alpha, f.at_least(0).at_most(1e30), "R is scaled by alpha / r; null or 0: by 1");
    f("para", para, "only take out: no R");
    f("deft_dropout", deft_dropout, f.at_least(0).below(1), "probability, on the input of R");
    f("init_weights", init_weights, "R takes the place of what is taken out; false: random");
  }
  static PeftForm peft_form() { return {.type = "DEFT", .bias_only = "deft_only"}; }
  bool starts_as_base() const { return false; }
};

class DeftLinear : public models::LinearAdapter {
 public:
  DeftLinear(const DeftConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : info_(site.info),
        qr_(c.decomposition_method == "qr"),
        dropout_(c.deft_dropout),
        random_(random) {
    const int64_t r = std::min<int64_t>(c.r, info_.out);
    if (c.alpha.value_or(0) > 0) scale_ = *c.alpha / static_cast<double>(r);
    p_ = register_parameter("deft_P", draw_normal({info_.out, r}, 0.02, random, device));
    if (c.para) return;
    const auto key = kernels::derive(random, 1);
    r_ = register_parameter("deft_R", draw_normal({r, info_.in}, 0.02 * c.init_scale, key, device));
  }
  static std::vector<Leaf> leaves() { return {{"deft_P", "deft_P"}, {"deft_R", "deft_R"}}; }
  void initialize(const DeftConfig& c, const LinearSite& site, BaseWeights& base) {
    if (!r_.defined() || !c.init_weights) return;
    r_.copy_(factors().second.t().mm(base.weight(site).to(p_.device())) / scale_);
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    const Tensor y = base(x);
    Tensor product = y.to(at::kFloat);  // W x
    if (info_.has_bias) product = product - base(at::zeros({1, info_.in}, x.options())).squeeze(0);
    const auto [q, right] = factors();
    Tensor inner = -product.matmul(right);
    if (r_.defined())
      inner = inner + at::linear(dropout(x, dropout_, pass, random_).to(at::kFloat), r_) * scale_;
    return y + inner.matmul(q.t()).to(y.scalar_type());
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    const auto [q, right] = factors();
    Tensor inner = -right.t().mm(w.to(right.scalar_type()));
    if (r_.defined()) inner = inner + r_ * scale_;
    return w + q.mm(inner).to(w.scalar_type());
  }

 private:
  /// Q and P'.
  std::pair<Tensor, Tensor> factors() const {
    if (!qr_) return {p_, p_.relu()};
    const Tensor q = std::get<0>(at::linalg_qr(p_));
    return {q, q};
  }

  models::LinearInfo info_;
  bool qr_;
  double dropout_, scale_ = 1;
  kernels::Key random_;
  Tensor p_, r_;
};

}  // namespace

void register_deft(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<DeftConfig, DeftLinear>>(); }});
}

}  // namespace graft::peft
