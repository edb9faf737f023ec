// HRA: y = W H_1 ... H_r x + b, H_k = I - 2 u_k u_k^T / |u_k|^2, a chain of Householder
// reflections.                                        Yuan et al. 2024, arXiv:2405.17484
// Trains U [in, r]: columns in equal pairs, each pair the identity, so the model is unchanged at
// step 0 up to rounding; an odd r starts at random, elsewhere. Mergeable. With apply_GS the columns
// are made orthonormal (Q), the chain is I - 2 Q Q^T, which is the identity nowhere: it starts at
// random too. (PEFT starts it with pairs, whose second column is then the rounding error of the
// first.) Fields and files are those of HF PEFT's HRAConfig. The paper adds orth_penalty |U^T U -
// I|^2 to the loss, PEFT does not: 0 is the default.
//
// The input is turned instead of the matrix, by the compact WY form of the chain:
// H_1 ... H_r = I - U S^-1 U^T, S = triu(U^T U, 1) + I / 2, for columns of length 1.
//                                     Schreiber and Van Loan 1989, doi:10.1137/0910005
#include <ATen/ATen.h>

#include <cmath>

#include "configs/check.h"
#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct HraConfig {
  Targets targets;
  int r = 8;
  bool apply_GS = false;
  double orth_penalty = 0;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "number of reflections; even, to start at the base");
    f("apply_GS", apply_GS, "make the reflections orthogonal to each other (Gram and Schmidt)");
    f("orth_penalty", orth_penalty, f.at_least(0).at_most(1e6),
      "the paper's lambda: how much the columns are to be orthonormal");
  }
  static PeftForm peft_form() {
    return {.type = "HRA",
            .bias_only = "hra_only",
            .inert = {"init_weights"},
            .ours = {"orth_penalty"}};
  }
  bool starts_as_base() const { return false; }  // not bit for bit
};

class HraLinear : public models::LinearAdapter {
 public:
  HraLinear(const HraConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : is_orthonormal_(c.apply_GS) {
    GRAFT_CHECK(!c.apply_GS || c.r <= site.info.in, "peft: hra: ", site.name, ": r = ", c.r,
                " reflections cannot be orthogonal in ", site.info.in, " dimensions");
    const bool pairs = !c.apply_GS && c.r % 2 == 0;
    Tensor u = draw_kaiming({site.info.in, pairs ? c.r / 2 : c.r}, random, device);
    if (pairs) u = u.repeat_interleave(2, 1);
    u_ = register_parameter("u", u);
  }
  static std::vector<Leaf> leaves() { return {{"u", "hra_u"}}; }
  /// Adds the gradient of weight |U^T U - I|^2.
  void add_penalty(double weight) const {
    const Tensor excess = u_.t().mm(u_) - at::eye(u_.size(1), u_.options());
    u_.grad().add_(u_.mm(excess), 4 * weight);
  }

  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    const auto [u, m] = factors();
    return base(kernels::lowrank_add(x.clone(at::MemoryFormat::Contiguous), x, u.t(), m, -1));
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    const auto [u, m] = factors();
    return w - w.to(m.scalar_type()).mm(m).mm(u.t()).to(w.scalar_type());
  }

 private:
  /// U and M of the chain I - M U^T.
  std::pair<Tensor, Tensor> factors() const {
    if (is_orthonormal_) {
      const Tensor q = std::get<0>(at::linalg_qr(u_));
      return {q, 2 * q};
    }
    const Tensor u = u_ / u_.norm(2, 0, /*keepdim=*/true);
    const Tensor s = at::triu(u.t().mm(u), 1) + 0.5 * at::eye(u.size(1), u.options());
    return {u, at::linalg_solve_triangular(s, u, /*upper=*/true, /*left=*/false)};
  }

  bool is_orthonormal_;
  Tensor u_;
};

class Hra : public LinearMethod<HraConfig, HraLinear> {
 public:
  void after_reduce(const StepInfo&) override {
    const at::NoGradGuard no_grad;
    if (config_.orth_penalty == 0) return;
    for (const auto& adapter : adapters_) adapter->add_penalty(config_.orth_penalty);
  }
};

}  // namespace

void register_hra(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Hra>(); }});
}

}  // namespace graft::peft
