// PVeRA: y = W x + b + d_b * (B z), z ~ N(m, exp v), [m; v] = d_d * (A x): a probabilistic VeRA.
//                                              Fillioux et al. 2025, arXiv:2512.07703
// Trains pvera_lambda_d [2 r] (d_initial) and pvera_lambda_b [out] (zeros): the model is unchanged
// at step 0. A [2 r, widest in] and B [widest out, r] are random, frozen and shared by all slots,
// which take the first columns and rows. Mergeable: at inference z is its mean, unless
// sample_at_inference. Fields and files are those of HF PEFT's PveraConfig; with save_projection:
// false the files hold no A and B, and projection_prng_key means the same numbers here as in
// PyTorch. z is drawn from the run's seed, so PEFT's generator_seed has no place here.
#include <ATen/ATen.h>

#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/vera_fields.h"

namespace graft::peft {
namespace {

struct PveraConfig : VeraFields {
  bool sample_at_inference = false;

  void fields(configs::Fields& f) {
    VeraFields::fields(f, "pvera");
    f("sample_at_inference", sample_at_inference, "draw z at inference too, not its mean");
  }
  static PeftForm peft_form() {
    return {
        .type = "PVERA", .bias_only = "pvera_only", .inert = {"init_weights", "generator_seed"}};
  }
};

class PveraLinear : public models::LinearAdapter {
 public:
  PveraLinear(const PveraConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : a_(c.a_of(site)),
        b_(c.b_of(site)),
        dropout_(c.dropout),
        always_drawn_(c.sample_at_inference),
        random_(random) {
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    d_ = register_parameter("lambda_d", at::full({2 * c.r}, c.d_initial, options));
    lambda_b_ = register_parameter("lambda_b", at::zeros({site.info.out}, options));
  }
  static std::vector<Leaf> leaves() {
    return {{"lambda_d", "pvera_lambda_d"}, {"lambda_b", "pvera_lambda_b"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    const auto type = x.scalar_type();
    const Tensor inner = at::linear(dropout(x, dropout_, pass, random_), a_.to(type)) * d_.to(type);
    const auto halves = inner.chunk(2, -1);
    Tensor z = halves[0];
    if (pass.training || always_drawn_) {
      const auto key = kernels::derive(pass.random, random_.stream, 1);  // dropout has the other
      const Tensor noise = draw_normal(z.sizes(), 1, key, z.device());
      z = z + noise.to(type) * (0.5 * halves[1]).exp();
    }
    return base(x) + at::linear(z, b_.to(type)) * lambda_b_.to(type);
  }
  bool mergeable() const override { return !always_drawn_; }
  Tensor merged(const Tensor& w) const override {
    const Tensor mean = (d_.unsqueeze(1) * a_).chunk(2)[0];
    return w + (lambda_b_.unsqueeze(1) * b_).mm(mean).to(w.scalar_type());
  }

 private:
  Tensor a_, b_;
  double dropout_;
  bool always_drawn_;
  kernels::Key random_;
  Tensor d_, lambda_b_;
};

class Pvera : public LinearMethod<PveraConfig, PveraLinear> {
 protected:
  void before_slots(AttachContext& context) override {
    config_.draw(context, sites_, 2 * config_.r, "pvera");
  }
};

}  // namespace

void register_pvera(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Pvera>(); }});
}

}  // namespace graft::peft
