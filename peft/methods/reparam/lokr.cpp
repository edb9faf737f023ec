// LoKr: y = W x + s (W1 (x) W2) x, s = alpha / r; (x) is the Kronecker product.
//   LyCORIS, Yeh et al. 2023, arXiv:2309.14859, sec. 3.2
// Trains W1 [o1, i1] and W2 [o2, i2], o1 o2 = out, i1 i2 = in: sizes near the square roots, or the
// first ones decompose_factor where that divides. W2 is C D with C [o2, r], D [r, i2] where r is
// below max(o2, i2) / 2; with decompose_both W1 likewise. Init: W1 (its left factor) zero, the rest
// Kaiming-uniform (a = sqrt 5), so the model is unchanged at step 0; "lycoris" has W2 zero instead.
// Mergeable. Fields and files are those of HF PEFT's LoKrConfig. PEFT keeps s where both are whole,
// LyCORIS has 1 there; rank_dropout and module_dropout are not applied.
#include <ATen/ATen.h>

#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct LokrConfig {
  Targets targets;
  int r = 8;
  double alpha = 8;
  bool decompose_both = false;
  int decompose_factor = -1;
  std::string init_weights = "true";
  std::map<std::string, int> rank_pattern;
  std::map<std::string, double> alpha_pattern;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 1 << 20), "rank of the factors; large: whole ones");
    f("alpha", alpha, f.positive().at_most(1e30), "the output is scaled by alpha / r");
    f("decompose_both", decompose_both, "W1 is a product of rank r too");
    f("decompose_factor", decompose_factor, f.at_least(-1),
      "the first size of each factorisation; -1: near the square root");
    f("init_weights", init_weights, f.one_of({"true", "lycoris", "false"}),
      "true: W1 is zero; lycoris: W2 is; false: none, not as the base");
    f("rank_pattern", rank_pattern, f.range(1, 1 << 20), "other ranks by slot, suffix or glob");
    f("alpha_pattern", alpha_pattern, f.positive().at_most(1e30),
      "other alpha by slot, suffix or glob");
  }
  static PeftForm peft_form() {
    return {
        .type = "LOKR",
        .inert = {"rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d"}};
  }
  bool starts_as_base() const { return init_weights != "false"; }
};

/// n = first * second, as PEFT splits it: `factor` first, if it divides; else first <= second,
/// first as large as it can be without being larger than `factor` (-1: any).
std::pair<int64_t, int64_t> lokr_split(int64_t n, int64_t factor) {
  if (factor > 0 && n % factor == 0) return {factor, n / factor};
  int64_t first = 1;
  for (int64_t m = 2; m * m <= n && (factor < 0 || m <= factor); ++m) {
    if (n % m == 0) first = m;
  }
  return {first, n / first};
}

class LokrLinear : public models::LinearAdapter {
 public:
  LokrLinear(const LokrConfig& c, const LinearSite& site, kernels::Key random, at::Device device) {
    const int64_t r = pattern_value(c.rank_pattern, site, c.r);
    scale_ = pattern_value(c.alpha_pattern, site, c.alpha) / static_cast<double>(r);
    const auto [o1, o2] = lokr_split(site.info.out, c.decompose_factor);
    const auto [i1, i2] = lokr_split(site.info.in, c.decompose_factor);
    const auto add = [&](const std::string& name, int64_t rows, int64_t columns, bool zero) {
      random = kernels::derive(random, 1);
      const Tensor t = draw_kaiming({rows, columns}, random, device);
      return register_parameter(name, zero ? t.zero_() : t);
    };
    const bool zero1 = c.init_weights == "true", zero2 = c.init_weights == "lycoris";
    if (c.decompose_both && 2 * r < std::max(o1, i1)) {
      w1_a_ = add("lokr_w1_a", o1, r, zero1);
      w1_b_ = add("lokr_w1_b", r, i1, false);
    } else {
      w1_ = add("lokr_w1", o1, i1, zero1);
    }
    if (2 * r < std::max(o2, i2)) {
      w2_a_ = add("lokr_w2_a", o2, r, false);
      w2_b_ = add("lokr_w2_b", r, i2, zero2);
    } else {
      w2_ = add("lokr_w2", o2, i2, zero2);
    }
  }
  static std::vector<Leaf> leaves() {
    return {{"lokr_w1", "lokr_w1"}, {"lokr_w1_a", "lokr_w1_a"}, {"lokr_w1_b", "lokr_w1_b"},
            {"lokr_w2", "lokr_w2"}, {"lokr_w2_a", "lokr_w2_a"}, {"lokr_w2_b", "lokr_w2_b"}};
  }
  /// x as [i1, i2]: W1 x W2^T is [o1, o2]. Through D first, which is the narrowest.
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    const Tensor y = base(x);
    const auto cast = [&](const Tensor& t) { return t.to(x.scalar_type()); };
    const Tensor first = cast(w1()), second = cast(w2_.defined() ? w2_ : w2_b_);
    Tensor t = x.unflatten(-1, {first.size(1), second.size(1)}).matmul(second.t());
    t = t.transpose(-2, -1).matmul(first.t()).transpose(-2, -1);
    if (!w2_.defined()) t = t.matmul(cast(w2_a_).t());
    return y + (t.flatten(-2) * scale_).to(y.scalar_type());
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    const Tensor w2 = w2_.defined() ? w2_ : w2_a_.mm(w2_b_);
    return w + (at::kron(w1(), w2) * scale_).to(w.scalar_type());
  }

 private:
  Tensor w1() const { return w1_.defined() ? w1_ : w1_a_.mm(w1_b_); }

  double scale_;
  Tensor w1_, w1_a_, w1_b_, w2_, w2_a_, w2_b_;
};

}  // namespace

void register_lokr(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<LokrConfig, LokrLinear>>(); }});
}

}  // namespace graft::peft
