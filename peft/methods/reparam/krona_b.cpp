// KronA^B: y = o + s (A (x) B) x beside the MLP, o = MLP(x); with `residual` KronA^B_res, which
// adds t x too, t a learned number.
//   Edalati et al. 2022, arXiv:2212.10650, sec. 3
// Trains A [o1, i1] and B [o2, i2] whole, o1 o2 = i1 i2 = the model's width, and t [1]. Init: A
// Kaiming-uniform (a = sqrt 5), B and t zero, so the model is unchanged at step 0 (the paper does
// not say which; krona.cpp is the same beside a single matrix). Not mergeable: the MLP is not
// linear. x is the MLP's input, its norm's output. HF PEFT has no such method.
#include <ATen/ATen.h>

#include "peft/draws.h"
#include "peft/krona.h"
#include "peft/sublayer_method.h"

namespace graft::peft {
namespace {

struct KronaBConfig {
  static constexpr const char* kName = "krona_b";
  std::vector<std::string> sites = {"mlp"};  ///< no field: the formula's
  configs::Auto<int> a_out, a_in;
  double scale = 1;
  bool residual = false;

  void fields(configs::Fields& f) {
    f("a_out", a_out, f.at_least(1), "rows of A, a divisor of the width; auto: near its root");
    f("a_in", a_in, f.at_least(1), "columns of A, a divisor of the width; auto: near its root");
    f("scale", scale, f.positive().at_most(1e30), "s");
    f("residual", residual, "add the input too, times a learned number (KronA^B_res)");
  }
  bool starts_as_base() const { return true; }
};

class KronaBAdapter : public models::SublayerAdapter {
 public:
  KronaBAdapter(const KronaBConfig& c, const SublayerPlace& place, kernels::Key random,
                at::Device device)
      : scale_(c.scale) {
    const int64_t width = place.width;
    const std::string slot = "block." + std::to_string(place.layer) + "." + place.role;
    const int64_t o1 = krona_factor(c.a_out, width, "a_out", slot);
    const int64_t i1 = krona_factor(c.a_in, width, "a_in", slot);
    a_ = register_parameter("krona_a", draw_kaiming({o1, i1}, random, device));
    b_ = register_parameter("krona_b", at::zeros({width / o1, width / i1}, a_.options()));
    if (c.residual) residual_ = register_parameter("residual", at::zeros({1}, a_.options()));
  }
  Tensor forward(const Tensor& h_BLD, const Sublayer& sublayer, const models::Pass&) override {
    const Tensor o = sublayer(h_BLD);
    Tensor added = krona_product(h_BLD, a_, b_).flatten(-2) * scale_;
    if (residual_.defined()) added = added + h_BLD * residual_.to(h_BLD.scalar_type());
    return o + added.to(o.scalar_type());
  }

 private:
  double scale_;
  Tensor a_, b_, residual_;
};

using KronaB = SublayerMethod<KronaBConfig, KronaBAdapter>;

}  // namespace

void register_krona_b(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<KronaB>(); }});
}

}  // namespace graft::peft
