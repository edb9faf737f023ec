// VeRA: y = W x + b + d_b * (B (d_d * (A x))).   Kopiczko et al. 2024, arXiv:2310.11454
// Trains vera_lambda_d [r] (d_initial) and vera_lambda_b [out] (zeros): the model is unchanged at
// step 0. A [r, widest in] and B [widest out, r] are random, frozen and shared by all slots, which
// take the first columns and rows. Mergeable. Fields and files are those of HF PEFT's VeraConfig;
// with save_projection: false the files hold no A and B, and projection_prng_key means the same
// numbers here as in PyTorch.
#include <ATen/ATen.h>

#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/vera_fields.h"

namespace graft::peft {
namespace {

struct VeraConfig : VeraFields {
  void fields(configs::Fields& f) { VeraFields::fields(f, "vera"); }
  static PeftForm peft_form() {
    return {.type = "VERA", .bias_only = "vera_only", .inert = {"init_weights"}};
  }
};

class VeraLinear : public models::LinearAdapter {
 public:
  VeraLinear(const VeraConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : a_(c.a_of(site)), b_(c.b_of(site)), dropout_(c.dropout), random_(random) {
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    d_ = register_parameter("lambda_d", at::full({c.r}, c.d_initial, options));
    lambda_b_ = register_parameter("lambda_b", at::zeros({site.info.out}, options));
  }
  static std::vector<Leaf> leaves() {
    return {{"lambda_d", "vera_lambda_d"}, {"lambda_b", "vera_lambda_b"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override {
    const auto type = x.scalar_type();
    const Tensor inner = at::linear(dropout(x, dropout_, pass, random_), a_.to(type));
    return base(x) + at::linear(inner * d_.to(type), b_.to(type)) * lambda_b_.to(type);
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + (lambda_b_.unsqueeze(1) * b_).mm(d_.unsqueeze(1) * a_).to(w.scalar_type());
  }

 private:
  Tensor a_, b_;
  double dropout_;
  kernels::Key random_;
  Tensor d_, lambda_b_;
};

class Vera : public LinearMethod<VeraConfig, VeraLinear> {
 protected:
  void before_slots(AttachContext& context) override {
    config_.draw(context, sites_, config_.r, "vera");
  }
};

}  // namespace

void register_vera(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Vera>(); }});
}

}  // namespace graft::peft
