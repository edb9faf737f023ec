// GraLoRA: y = W x + s Delta x (+ s B' A' x), Delta of k x k blocks, each a LoRA of rank r / k.
//   Jung et al. 2025, "GraLoRA: Granular Low-Rank Adaptation", arXiv:2505.20355
// Block (j, n) is B_j[n]^T A_n[j]^T: A_n x_n [r] is cut into k parts, and part j goes to output j.
// Trains A [k, in / k, r] (Kaiming-uniform, a = sqrt 5) and B [k, r, out / k] (zeros): the model is
// unchanged at step 0; with hybrid_r a plain LoRA A' [hybrid_r, in], B' [out, hybrid_r] beside
// them. s = alpha / (r + hybrid_r). Mergeable. Fields and files are those of HF PEFT's
// GraloraConfig.
#include <ATen/ATen.h>

#include <cmath>
#include <numeric>

#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct GraloraConfig {
  Targets targets;
  int r = 32;
  int hybrid_r = 0;
  double alpha = 64;
  double gralora_dropout = 0;
  int gralora_k = 2;
  bool init_weights = true;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 1 << 16), "rank of A and B, a multiple of gralora_k");
    f("hybrid_r", hybrid_r, f.range(0, 1 << 16), "rank of the plain LoRA beside the blocks");
    f("alpha", alpha, f.positive().at_most(1e30), "the output is scaled by alpha / (r + hybrid_r)");
    f("gralora_dropout", gralora_dropout, f.at_least(0).below(1),
      "probability, on the adapter's input");
    f("gralora_k", gralora_k, f.range(1, 1 << 16), "k: blocks along the inputs and the outputs");
    f("init_weights", init_weights, "false: B starts at random too, not as the base");
  }
  int rank(const LinearSite&) const { return r; }
  static PeftForm peft_form() { return {.type = "GRALORA", .bias_only = "gralora_only"}; }
  bool starts_as_base() const { return init_weights; }
};

class GraloraLinear : public models::LinearAdapter {
 public:
  GraloraLinear(const GraloraConfig& c, const LinearSite& site, kernels::Key random,
                at::Device device)
      : k_(c.gralora_k),
        s_(c.r / c.gralora_k),
        scale_(c.alpha / (c.r + c.hybrid_r)),
        dropout_(c.gralora_dropout),
        random_(random) {
    const int64_t in = site.info.in, out = site.info.out;
    GRAFT_CHECK(c.r % k_ == 0, "peft: ", site.name, ": r = ", c.r,
                " is not a multiple of gralora_k = ", k_);
    GRAFT_CHECK(in % k_ == 0 && out % k_ == 0, "peft: ", site.name, ": gralora_k = ", k_,
                " does not divide both ", in, " and ", out, "; the divisors of ", std::gcd(in, out),
                " do");
    const auto add = [&](const char* name, at::IntArrayRef shape, int64_t fan_in, bool zero) {
      random = kernels::derive(random, 1);
      const double bound = zero ? 0 : 1 / std::sqrt(static_cast<double>(fan_in));
      return register_parameter(name, draw_uniform(shape, bound, random, device));
    };
    a_ = add("gralora_A", {k_, in / k_, c.r}, in / k_, false);
    b_ = add("gralora_B", {k_, c.r, out / k_}, c.r, c.init_weights);
    if (c.hybrid_r == 0) return;
    plain_a_ = add("gralora_A_general", {c.hybrid_r, in}, in, false);
    plain_b_ = add("gralora_B_general", {out, c.hybrid_r}, c.hybrid_r, c.init_weights);
  }
  static std::vector<Leaf> leaves() {
    return {{"gralora_A", "gralora_A"},
            {"gralora_B", "gralora_B"},
            {"gralora_A_general", "gralora_A_general.weight"},
            {"gralora_B_general", "gralora_B_general.weight"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    const Tensor y = base(x), dropped = dropout(x, dropout_, pass, random_);
    const Tensor a = a_.to(x.scalar_type()), b = b_.to(x.scalar_type());
    Tensor t = at::einsum("...ni,nir->...nr", {dropped.unflatten(-1, {k_, -1}), a});
    t = t.unflatten(-1, {k_, s_}).transpose(-3, -2).flatten(-2);  // [..., j, (n s)]
    t = at::einsum("...jr,jro->...jo", {t, b}).flatten(-2);
    const Tensor sum = y + (t * scale_).to(y.scalar_type());
    return plain_a_.defined() ? kernels::lowrank_add(sum, dropped, plain_a_, plain_b_, scale_)
                              : sum;
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    const Tensor a = a_.unflatten(2, {k_, s_}), b = b_.unflatten(1, {k_, s_});
    Tensor delta = at::einsum("nijs,jnso->joni", {a, b}).reshape(w.sizes());
    if (plain_a_.defined()) delta = delta + plain_b_.mm(plain_a_);
    return w + (delta * scale_).to(w.scalar_type());
  }

 private:
  int64_t k_, s_;
  double scale_, dropout_;
  kernels::Key random_;
  Tensor a_, b_, plain_a_, plain_b_;
};

}  // namespace

void register_gralora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<GraloraConfig, GraloraLinear>>(); }});
}

}  // namespace graft::peft
