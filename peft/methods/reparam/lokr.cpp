// LoKr: y = W x + s (W1 (x) W2) x, s = alpha / r; (x) is the Kronecker product.
//   LyCORIS, Yeh et al. 2023, arXiv:2309.14859, sec. 3.2
// Trains W1 [o1, i1] and W2 [o2, i2], o1 o2 = out, i1 i2 = in: sizes near the square roots, or the
// first ones decompose_factor where that divides. W2 is C D with C [o2, r], D [r, i2] where r is
// below max(o2, i2) / 2; with decompose_both W1 likewise. Init: W1 (its left factor) zero, the rest
// Kaiming-uniform (a = sqrt 5), so the model is unchanged at step 0; "lycoris" has W2 zero instead.
// Mergeable. Fields and files are those of HF PEFT's LoKrConfig, and so are the defaults where
// LyCORIS differs: it puts the smaller size first (factorization), lets W2 be whole at any rank
// (full_matrix), has s = 1 where both are whole (unit_scale), r = 4, alpha = 1 and its own start.
// What else only LyCORIS has: peft/delta_linear.h. (Its own merge multiplies by s twice; its
// forward pass, and we, once.)
#include <ATen/ATen.h>

#include "peft/delta_linear.h"
#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct LokrConfig : DeltaFields {
  Targets targets;
  int r = 8;
  double alpha = 8;
  bool decompose_both = false;
  int decompose_factor = -1;
  std::string factorization = "peft";
  bool full_matrix = false, unit_scale = false;
  std::string init_weights = "true";
  std::map<std::string, int> rank_pattern;
  std::map<std::string, double> alpha_pattern;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 1 << 20), "rank of the factors; large: whole ones");
    f("alpha", alpha, f.positive().at_most(1e30), "the output is scaled by alpha / r");
    f("decompose_both", decompose_both, "W1 is a product of rank r too");
    f("decompose_factor", decompose_factor, f.at_least(-1),
      "the first size of each factorisation; -1: near the square root");
    f("factorization", factorization, f.one_of({"peft", "lycoris", "unbalanced"}),
      "lycoris: the smaller size first; unbalanced: of the outputs the larger one");
    f("full_matrix", full_matrix, "W1 and W2 are whole at any rank");
    f("unit_scale", unit_scale, "no scale where both are whole");
    f("init_weights", init_weights, f.one_of({"true", "lycoris", "false"}),
      "true: W1 is zero; lycoris: W2 is; false: none, not as the base");
    f("rank_pattern", rank_pattern, f.range(1, 1 << 20), "other ranks by slot, suffix or glob");
    f("alpha_pattern", alpha_pattern, f.positive().at_most(1e30),
      "other alpha by slot, suffix or glob");
    DeltaFields::fields(f);
  }
  static PeftForm peft_form() {
    PeftForm form{.type = "LOKR", .inert = {"use_effective_conv2d"}, .ours = ours()};
    form.ours.insert(form.ours.end(), {"factorization", "full_matrix", "unit_scale"});
    return form;
  }
  bool is_pefts() const {
    return DeltaFields::is_pefts() && factorization == "peft" && !full_matrix && !unit_scale;
  }
  bool starts_as_base() const {
    return (init_weights != "false" || use_scalar) && !weight_decompose;
  }
};

/// n = first * second: `factor` first, if it divides; else first <= second, first as large as it
/// can be without being larger than `factor` (-1: any).
std::pair<int64_t, int64_t> lokr_split(int64_t n, int64_t factor) {
  if (factor > 0 && n % factor == 0) return {factor, n / factor};
  int64_t first = 1;
  for (int64_t m = 2; m * m <= n && (factor < 0 || m <= factor); ++m) {
    if (n % m == 0) first = m;
  }
  return {first, n / first};
}

class LokrLinear : public DeltaLinear {
 public:
  LokrLinear(const LokrConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : DeltaLinear(c, site, random, device) {
    const int64_t r = pattern_value(c.rank_pattern, site, c.r);
    scale_ = c.scale(pattern_value(c.alpha_pattern, site, c.alpha), r);
    auto [o1, o2] = lokr_split(site.info.out, c.decompose_factor);
    auto [i1, i2] = lokr_split(site.info.in, c.decompose_factor);
    if (c.factorization != "peft") {
      if (o1 > o2) std::swap(o1, o2);
      if (i1 > i2) std::swap(i1, i2);
    }
    if (c.factorization == "unbalanced") std::swap(o1, o2);
    const auto add = [&](const std::string& name, int64_t rows, int64_t columns, bool zero) {
      random = kernels::derive(random, 1);
      const Tensor t = draw_kaiming({rows, columns}, random, device);
      return register_parameter(name, zero && !c.use_scalar ? t.zero_() : t);
    };
    const bool zero1 = c.init_weights == "true", zero2 = c.init_weights == "lycoris";
    if (c.decompose_both && 2 * r < std::max(o1, i1) && !c.full_matrix) {
      w1_a_ = add("lokr_w1_a", o1, r, zero1);
      w1_b_ = add("lokr_w1_b", r, i1, false);
    } else {
      w1_ = add("lokr_w1", o1, i1, zero1);
    }
    if (2 * r < std::max(o2, i2) && !c.full_matrix) {
      w2_a_ = add("lokr_w2_a", o2, r, false);
      w2_b_ = add("lokr_w2_b", r, i2, zero2);
    } else {
      w2_ = add("lokr_w2", o2, i2, zero2);
    }
    if (c.unit_scale && w1_.defined() && w2_.defined()) scale_ = 1;
  }
  static std::vector<Leaf> leaves() {
    return DeltaFields::leaves({{"lokr_w1", "lokr_w1"},
                                {"lokr_w1_a", "lokr_w1_a"},
                                {"lokr_w1_b", "lokr_w1_b"},
                                {"lokr_w2", "lokr_w2"},
                                {"lokr_w2_a", "lokr_w2_a"},
                                {"lokr_w2_b", "lokr_w2_b"}});
  }
  void initialize(const LokrConfig&, const LinearSite& site, BaseWeights& base) {
    take_magnitudes(site, base);
  }

 private:
  /// x as [i1, i2]: W1 x W2^T is [o1, o2]. Through D first, which is the narrowest.
  Tensor add(const Tensor& y, const Tensor& x, const Tensor& rows) const override {
    const auto cast = [&](const Tensor& t) { return t.to(x.scalar_type()); };
    const Tensor first = cast(w1()), second = cast(w2_.defined() ? w2_ : w2_b_);
    Tensor t = x.unflatten(-1, {first.size(1), second.size(1)}).matmul(second.t());
    t = t.transpose(-2, -1).matmul(first.t()).transpose(-2, -1);
    if (!w2_.defined()) t = t.matmul(cast(w2_a_).t());
    t = t.flatten(-2) * scale_;
    return y + (rows.defined() ? t * rows : t).to(y.scalar_type());
  }
  Tensor delta() const override {
    const Tensor w2 = w2_.defined() ? w2_ : w2_a_.mm(w2_b_);
    return at::kron(w1(), w2) * scale_;
  }
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
