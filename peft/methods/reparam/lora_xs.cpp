// LoRA-XS: y = W x + s B R A x, s = alpha / r, with W ~ U S V^T cut at rank r, A = V^T, B = U S.
//   Balazy et al. 2024, arXiv:2405.17604, eq. 2
// Trains R [r, r] (normal with deviation 1e-5, the paper's, so the model is the base up to that; 0:
// exactly). A [r, in] and B [out, r] are frozen and saved. Mergeable. U, S and V come from subspace
// iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, alg. 4.4), as in the authors' code,
// with the largest number of each column of U positive. Theirs calls U S "A".
#include <ATen/ATen.h>

#include "kernels/lowrank/lowrank.h"
#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct LoraXsConfig {
  Targets targets;
  int r = 16;
  double alpha = 16;
  double init_deviation = 1e-5;
  double dropout = 0;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "rank; r^2 values are trained");
    f("alpha", alpha, f.positive().at_most(1e30), "the output is scaled by alpha / r");
    f("init_deviation", init_deviation, f.at_least(0).at_most(1e3),
      "standard deviation of R at the start");
    f("dropout", dropout, f.at_least(0).below(1), "probability, on the adapter's input");
  }
  bool starts_as_base() const { return init_deviation == 0; }
};

class LoraXsLinear : public models::LinearAdapter {
 public:
  LoraXsLinear(const LoraXsConfig& c, const LinearSite& site, kernels::Key random,
               at::Device device)
      : scale_(c.alpha / c.r), dropout_(c.dropout), random_(random) {
    const int64_t in = site.info.in, out = site.info.out, r = c.r;
    GRAFT_CHECK(r <= std::min(in, out), "peft: ", site.name, ": r = ", r, ", at most ",
                std::min(in, out));
    r_ = register_parameter("lora_xs_r", draw_normal({r, r}, c.init_deviation, random, device));
    a_ = register_buffer("lora_xs_a", at::zeros({r, in}, r_.options()).detach());
    b_ = register_buffer("lora_xs_b", at::zeros({out, r}, r_.options()).detach());
  }
  static std::vector<Leaf> leaves() {
    return {{"lora_xs_r", "lora_xs_r"}, {"lora_xs_a", "lora_xs_a"}, {"lora_xs_b", "lora_xs_b"}};
  }
  void initialize(const LoraXsConfig&, const LinearSite& site, BaseWeights& base) {
    constexpr int64_t kMore = 10;  // columns beyond r
    constexpr int kIterations = 10;
    const Tensor w = base.weight(site).to(a_.device());
    const int64_t r = a_.size(0), columns = std::min({r + kMore, w.size(0), w.size(1)});
    const auto key = kernels::derive(random_, 1);
    Tensor q = w.mm(draw_normal({w.size(1), columns}, 1, key, w.device()));
    for (int i = 0; i < kIterations; ++i) {
      q = std::get<0>(at::linalg_qr(q));
      q = w.mm(std::get<0>(at::linalg_qr(w.t().mm(q))));
    }
    q = std::get<0>(at::linalg_qr(q));
    const auto [u, s, v] = at::linalg_svd(q.t().mm(w), /*full_matrices=*/false);
    Tensor left = q.mm(u).slice(1, 0, r);
    const Tensor largest = left.gather(0, left.abs().argmax(0, true));
    const Tensor sign = largest.sign();  // [1, r]
    b_.copy_(left * sign * s.slice(0, 0, r));
    a_.copy_(v.slice(0, 0, r) * sign.t());
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    // A first: autograd then keeps [tokens, r], not x.
    const Tensor t = at::linear(dropout(x, dropout_, pass, random_), a_.to(x.scalar_type()));
    return kernels::lowrank_add(base(x), t, r_, b_, scale_);
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + (b_.mm(r_).mm(a_) * scale_).to(w.scalar_type());
  }
  std::optional<models::LowRank> low_rank() const override {
    return models::LowRank{r_.mm(a_), b_, scale_};
  }

 private:
  double scale_, dropout_;
  kernels::Key random_;
  Tensor r_, a_, b_;
};

}  // namespace

void register_lora_xs(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<LoraXsConfig, LoraXsLinear>>(); }});
}

}  // namespace graft::peft
