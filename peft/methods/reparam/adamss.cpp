// AdaMSS: y = W x + b + B A P [x; 1], P [r, in (+ 1)] the first right singular vectors of [W, b]
// (of W where there is no b).                                                            NeurIPS
// 2025 Trains A [subspace_rank, r] (orthonormal rows) and B [out, subspace_rank] (zeros): the model
// is unchanged at step 0. P is frozen and saved; it comes from subspace iteration, as PyTorch's
// svd_lowrank has it with random_seed. Mergeable where there is no bias. Fields and files are those
// of HF PEFT's AdamssConfig, with one subspace: several would be clusters of the rows of W, whose
// sizes are known only when the base has been read, and use_asa and use_dynamic_rank choose among
// them.
#include <ATen/ATen.h>

#include <algorithm>

#include "configs/check.h"
#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/projection.h"

namespace graft::peft {
namespace {

struct AdamssConfig {
  Targets targets;
  int r = 100;
  int subspace_rank = 1;
  int random_seed = 0;
  std::string init_weights = "orthogonal";

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 65536), "singular vectors, at most those of the matrix");
    f("subspace_rank", subspace_rank, f.range(1, 4096), "rank of the update");
    f("random_seed", random_seed, f.at_least(0), "of the subspace iteration");
    f("init_weights", init_weights, f.one_of({"orthogonal", "false"}),
      "B zero; false: B normal, not as the base");
  }
  static PeftForm peft_form() {
    return {.type = "ADAMSS",
            .fixed = {{"num_subspaces", 1}, {"use_asa", false}, {"use_dynamic_rank", false}},
            .inert = {"asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval",
                      "asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent",
                      "svd_threshold"}};
  }
  bool starts_as_base() const { return init_weights == "orthogonal"; }
};

class AdamssLinear : public models::LinearAdapter {
 public:
  AdamssLinear(const AdamssConfig& c, const LinearSite& site, kernels::Key random,
               at::Device device)
      : in_(site.info.in), has_bias_(site.info.has_bias) {
    const int64_t width = in_ + (has_bias_ ? 1 : 0), out = site.info.out;
    const int64_t r = std::min({int64_t{c.r}, out, width}), rank = c.subspace_rank;
    GRAFT_CHECK(rank <= r, "peft: adamss: ", site.name, ": subspace_rank = ", rank,
                ", at most r = ", r, " is possible");
    const Tensor basis = std::get<0>(at::linalg_qr(draw_normal({r, rank}, 1, random, at::kCPU)));
    a_ = register_parameter("a", basis.t().contiguous().to(device));
    const double deviation = c.starts_as_base() ? 0 : 0.01;
    b_ = register_parameter(
        "b", draw_normal({out, rank}, deviation, kernels::derive(random, 1), device));
    p_ = register_buffer("p", at::zeros({r, width}, b_.options()).detach());
  }
  static std::vector<Leaf> leaves() {
    return {{"a", "adamss_A.0"}, {"b", "adamss_B.0"}, {"p", "adamss_newB"}};
  }
  void initialize(const AdamssConfig& c, const LinearSite& site, BaseWeights& base) {
    constexpr int kIterations = 2;
    Tensor w = base.weight(site).cpu();
    if (has_bias_) w = at::cat({w, base.bias(site).cpu().unsqueeze(1)}, 1);
    const bool is_wide = w.size(0) < w.size(1);
    if (is_wide) w = w.t();
    const auto generator = torch_generator(static_cast<uint64_t>(c.random_seed));
    const auto basis_of = [](const Tensor& t) { return std::get<0>(at::linalg_qr(t)); };
    Tensor q = basis_of(w.mm(at::randn({w.size(1), p_.size(0)}, generator, w.options())));
    for (int i = 0; i < kIterations; ++i) q = basis_of(w.mm(basis_of(w.t().mm(q))));
    const auto [u, s, vh] = at::linalg_svd(q.t().mm(w), /*full_matrices=*/false);
    p_.copy_(is_wide ? q.mm(u).t() : vh);
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    Tensor y = base(x);
    if (has_bias_) y = y + b_.mv(a_.mv(p_.select(1, in_))).to(y.scalar_type());
    return kernels::lowrank_add(y, x, a_.mm(p_.slice(1, 0, in_)), b_, 1);
  }
  bool mergeable() const override { return !has_bias_; }
  Tensor merged(const Tensor& w) const override { return w + b_.mm(a_.mm(p_)).to(w.scalar_type()); }

 private:
  int64_t in_;
  bool has_bias_;
  Tensor a_, b_, p_;
};

}  // namespace

void register_adamss(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<AdamssConfig, AdamssLinear>>(); }});
}

}  // namespace graft::peft
