// LoHa: y = W x + s ((A1 B1) o (A2 B2)) x, s = alpha / r.
//   Hadamard product of two low-rank matrices: FedPara, Hyeon-Woo, Ye-Bin and Oh 2021,
//   arXiv:2108.06098, prop. 1; as an adapter: LyCORIS, Yeh et al. 2023, arXiv:2309.14859, sec. 3.2
// Trains A1, A2 [out, r] and B1, B2 [r, in]: a rank of up to r^2. Init true: A1, B1, A2
// Kaiming-uniform (a = sqrt 5), B2 zero, so the model is unchanged at step 0; lycoris: B1, B2
// N(0, 1), A1 N(0, 0.1^2), A2 zero. Mergeable. Fields and files are those of HF PEFT's LoHaConfig,
// and so are the defaults where LyCORIS differs: it has r = 4, alpha = 1, its own start and no
// rank_dropout_scale, which PEFT always has. What only LyCORIS has: peft/delta_linear.h. (LyCORIS's
// own merge multiplies by s twice; its forward pass, and we, once.)
#include <ATen/ATen.h>

#include "kernels/lowrank/lowrank.h"
#include "peft/delta_linear.h"
#include "peft/draws.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct LohaConfig : DeltaFields {
  LohaConfig() { rank_dropout_scale = true; }
  Targets targets;
  int r = 8;
  double alpha = 8;
  std::string init_weights = "true";
  std::map<std::string, int> rank_pattern;
  std::map<std::string, double> alpha_pattern;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "rank of each of the two products");
    f("alpha", alpha, f.positive().at_most(1e30), "the output is scaled by alpha / r");
    f("init_weights", init_weights, f.one_of({"true", "lycoris", "false"}),
      "true: B2 is zero; lycoris: A2 is, the rest normal; false: none, not as the base");
    f("rank_pattern", rank_pattern, f.range(1, 4096), "other ranks by slot, suffix or glob");
    f("alpha_pattern", alpha_pattern, f.positive().at_most(1e30),
      "other alpha by slot, suffix or glob");
    DeltaFields::fields(f);
  }
  int rank(const LinearSite& site) const { return pattern_value(rank_pattern, site, r); }
  static PeftForm peft_form() {
    PeftForm form{.type = "LOHA", .inert = {"use_effective_conv2d"}, .ours = ours()};
    form.ours.emplace_back("rank_dropout_scale");
    return form;
  }
  bool starts_as_base() const {
    return (init_weights != "false" || use_scalar) && !weight_decompose;
  }
};

class LohaLinear : public DeltaLinear {
 public:
  LohaLinear(const LohaConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : DeltaLinear(c, site, random, device) {
    const int64_t r = c.rank(site);
    scale_ = c.scale(pattern_value(c.alpha_pattern, site, c.alpha), r);
    const bool lycoris = c.init_weights == "lycoris";
    const auto draw = [&](const char* name, int64_t rows, int64_t columns, int number) {
      const auto key = kernels::derive(random, number);
      const double deviation = rows == r && columns == site.info.in ? 1 : 0.1;
      return register_parameter(name, lycoris ? draw_normal({rows, columns}, deviation, key, device)
                                              : draw_kaiming({rows, columns}, key, device));
    };
    a1_ = draw("hada_w1_a", site.info.out, r, 1);
    b1_ = draw("hada_w1_b", r, site.info.in, 2);
    a2_ = draw("hada_w2_a", site.info.out, r, 3);
    b2_ = draw("hada_w2_b", r, site.info.in, 4);
    const at::NoGradGuard no_grad;
    if (c.init_weights != "false" && !c.use_scalar) (lycoris ? a2_ : b2_).zero_();
  }
  static std::vector<Leaf> leaves() {
    return DeltaFields::leaves({{"hada_w1_a", "hada_w1_a"},
                                {"hada_w1_b", "hada_w1_b"},
                                {"hada_w2_a", "hada_w2_a"},
                                {"hada_w2_b", "hada_w2_b"}});
  }
  void initialize(const LohaConfig&, const LinearSite& site, BaseWeights& base) {
    take_magnitudes(site, base);
  }

 private:
  /// The update is a LoRA of r^2 columns, a1_p o a2_q times b1_p o b2_q; where those are more
  /// numbers than the matrix has, the matrix itself.
  Tensor add(const Tensor& y, const Tensor& x, const Tensor& rows) const override {
    const int64_t r = b1_.size(0), in = b1_.size(1), out = a1_.size(0);
    const auto scaled = [&](const Tensor& t) { return rows.defined() ? t * rows.unsqueeze(1) : t; };
    if (r * r * (in + out) > in * out)
      return y + at::linear(x, scaled(delta()).to(x.scalar_type())).to(y.scalar_type());
    const Tensor a = (b1_.unsqueeze(1) * b2_.unsqueeze(0)).reshape({r * r, in});
    const Tensor b = (a1_.unsqueeze(2) * a2_.unsqueeze(1)).reshape({out, r * r});
    return kernels::lowrank_add(y, x, a, scaled(b), scale_);
  }
  Tensor delta() const override { return a1_.mm(b1_) * a2_.mm(b2_) * scale_; }

  double scale_;
  Tensor a1_, b1_, a2_, b2_;
};

}  // namespace

void register_loha(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<LohaConfig, LohaLinear>>(); }});
}

}  // namespace graft::peft
