// PSOFT: y = W x + b + s B (R - I) A x, s = psoft_alpha / r: the r largest singular directions of W
// are turned, the others stay. B A = W_r / s with A, B from W = U S V^T: A = V_r^T, B = U_r S_r / s
// (psoft_init) or both with the root of S_r / s (pissa_init). R = diag(v_b) Q diag(v_a), Q Cayley's
// (I + K) (I - K)^-1 of a skew-symmetric K.        Wu et al. 2025, ICLR 2026
// Trains K above its diagonal, psoft_R.weight [r (r - 1) / 2] (zeros), or a free R [r, r] (I), and
// v_a, v_b [r] (ones): the model is unchanged at step 0. A and B are taken from the base at the
// start and saved: the singular directions of the same base quantised otherwise are others.
// Mergeable. Fields and files are those of HF PEFT's PsoftConfig; its approximate SVD is not
// supported. PEFT saves no A and B and takes them from its base when it loads.
#include <ATen/ATen.h>

#include <algorithm>

#include "configs/check.h"
#include "kernels/lowrank/lowrank.h"
#include "peft/adapter_file.h"
#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/rotation.h"

namespace graft::peft {
namespace {

struct PsoftConfig {
  Targets targets;
  int r = 32;
  double psoft_alpha = 32;
  double psoft_dropout = 0;
  std::string ab_svd_init = "psoft_init";
  bool psoft_orth = true;
  bool psoft_mag_b = true;
  bool psoft_mag_a = true;
  bool use_cayley_neumann = false;
  int num_cayley_neumann_terms = 5;
  std::optional<double> cayley_neumann_eps;

  void fields(configs::Fields& f) {
    f("r", r, f.range(2, 4096), "singular directions that are turned");
    f("psoft_alpha", psoft_alpha, f.positive().at_most(1e30), "the update is scaled by this / r");
    f("psoft_dropout", psoft_dropout, f.at_least(0).below(1), "on the adapter's input");
    f("ab_svd_init", ab_svd_init, f.one_of({"psoft_init", "pissa_init"}),
      "singular values in B, or their roots in both");
    f("psoft_orth", psoft_orth, "R orthogonal but for its scales; false: any matrix");
    f("psoft_mag_b", psoft_mag_b, "a scale of each output of R");
    f("psoft_mag_a", psoft_mag_a, "a scale of each input of R");
    f("use_cayley_neumann", use_cayley_neumann, "a short power series instead of the exact R");
    f("num_cayley_neumann_terms", num_cayley_neumann_terms, f.range(1, 64), "of that series");
    f("cayley_neumann_eps", cayley_neumann_eps, f.positive().below(1), "most |K| in that series");
  }
  static PeftForm peft_form() {
    return {.type = "PSOFT",
            .fixed = {{"psoft_svd", "full"}},
            .inert = {"init_weights", "psoft_svd_lowrank_niter", "random_seed"}};
  }
};

class PsoftLinear : public models::LinearAdapter {
 public:
  PsoftLinear(const PsoftConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : c_(c), scale_(c.psoft_alpha / c.r), random_(random) {
    GRAFT_CHECK(c.r <= std::min(site.info.in, site.info.out), "peft: psoft: ", site.name, " is ",
                site.info.out, " by ", site.info.in, " and has fewer than r = ", c.r,
                " singular directions");
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    r_ = register_parameter(
        "weight", c.psoft_orth ? at::zeros({c.r * (c.r - 1) / 2}, options) : at::eye(c.r, options));
    if (c.psoft_mag_b) v_b_ = register_parameter("vector_b", at::ones({c.r}, options));
    if (c.psoft_mag_a) v_a_ = register_parameter("vector_a", at::ones({c.r}, options));
    a_ = register_buffer("a", at::zeros({c.r, site.info.in}, options));
    b_ = register_buffer("b", at::zeros({site.info.out, c.r}, options));
  }
  static std::vector<Leaf> leaves() {
    return {{"weight", "psoft_R.weight"},
            {"vector_a", "psoft_R.vector_a"},
            {"vector_b", "psoft_R.vector_b"}};
  }
  void initialize(const PsoftConfig&, const LinearSite& site, BaseWeights& base) {
    if (a_.any().item<bool>()) return;  // those of the file
    const auto [u, s, vh] = at::linalg_svd(base.weight(site), /*full_matrices=*/false);
    const bool in_both = c_.ab_svd_init == "pissa_init";
    const Tensor size = s.slice(0, 0, c_.r) / scale_, root = size.sqrt();
    a_.copy_(vh.slice(0, 0, c_.r) *
             (in_both ? root.unsqueeze(1) : at::ones_like(root).unsqueeze(1)));
    b_.copy_(u.slice(1, 0, c_.r) * (in_both ? root : size));
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    return kernels::lowrank_add(base(x), dropout(x, c_.psoft_dropout, pass, random_), turned_a(),
                                b_, scale_);
  }
  std::vector<std::pair<std::string, Tensor>> directions() const {
    return {{"psoft_A", a_}, {"psoft_B", b_}};
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + (scale_ * b_.mm(turned_a())).to(w.scalar_type());
  }

 private:
  /// Q, or the free matrix.
  Tensor matrix(const Tensor& identity) const {
    if (!c_.psoft_orth) return r_;
    Tensor k = skew_matrices(r_.unsqueeze(0), c_.r);
    if (!c_.use_cayley_neumann) return identity + cayley_change(-k)[0];
    if (c_.cayley_neumann_eps) {
      const double eps = *c_.cayley_neumann_eps;
      k = k * (eps / k.norm().clamp_min(eps));
    }
    return identity + neumann_change(k, c_.num_cayley_neumann_terms)[0];
  }
  /// (R - I) A.
  Tensor turned_a() const {
    const Tensor identity = at::eye(c_.r, a_.options());
    Tensor r = matrix(identity);
    if (v_b_.defined()) r = v_b_.unsqueeze(1) * r;
    if (v_a_.defined()) r = r * v_a_;
    return (r - identity).mm(a_);
  }

  PsoftConfig c_;
  double scale_;
  kernels::Key random_;
  Tensor r_, v_a_, v_b_, a_, b_;
};

class Psoft : public LinearMethod<PsoftConfig, PsoftLinear> {
 protected:
  void attach_to(AttachContext& context, const LinearSite& site) override {
    LinearMethod::attach_to(context, site);
    for (const auto& [name, value] : adapters_.back()->directions()) {
      context.params.add(Constant{.name = context.prefix + site.name + "." + name,
                                  .hf_key = std::string(kFilePrefix) + site.hf_path + "." + name,
                                  .value = value,
                                  .may_be_left_out = true});
    }
  }
};

}  // namespace

void register_psoft(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Psoft>(); }});
}

}  // namespace graft::peft
