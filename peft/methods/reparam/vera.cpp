// VeRA: y = W x + b + d_b * (B (d_d * (A x))).   Kopiczko et al. 2024, arXiv:2310.11454
// Trains vera_lambda_d [r] (d_initial) and vera_lambda_b [out] (zeros): the model is unchanged at
// step 0. A [r, widest in] and B [widest out, r] are random, frozen and shared by all slots, which
// take the first columns and rows. Mergeable. Fields and files are those of HF PEFT's VeraConfig;
// with save_projection: false the files hold no A and B, and projection_prng_key means the same
// numbers here as in PyTorch.
#include <ATen/ATen.h>

#include "peft/draws.h"
#include "peft/linear_method.h"
#include "peft/projection.h"

namespace graft::peft {
namespace {

struct VeraConfig {
  Targets targets;
  int r = 256;
  int projection_prng_key = 0;
  bool save_projection = true;
  double vera_dropout = 0;
  double d_initial = 0.1;
  Tensor a, b;  ///< no fields: what the slots share

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 65536), "rank, the inner size");
    f("projection_prng_key", projection_prng_key, f.at_least(0), "seed of the shared matrices");
    f("save_projection", save_projection, "save the shared matrices too, not only their seed");
    f("vera_dropout", vera_dropout, f.at_least(0).below(1), "probability, on the adapter's input");
    f("d_initial", d_initial, "first value of vera_lambda_d");
  }
  static PeftForm peft_form() {
    return {.type = "VERA", .bias_only = "vera_only", .inert = {"init_weights"}};
  }
};

class VeraLinear : public models::LinearAdapter {
 public:
  VeraLinear(const VeraConfig& c, const LinearSite& site, kernels::Key random, at::Device device)
      : a_(c.a.slice(1, 0, site.info.in)),
        b_(c.b.slice(0, 0, site.info.out)),
        dropout_(c.vera_dropout),
        random_(random) {
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
  void attach_to(AttachContext& context, const LinearSite& site) override {
    if (!config_.a.defined()) {
      const Widths width = widest(sites_);
      const auto generator = torch_generator(static_cast<uint64_t>(config_.projection_prng_key));
      config_.a = torch_kaiming_uniform({config_.r, width.in}, 0, generator).to(context.device);
      config_.b = torch_kaiming_uniform({width.out, config_.r}, 0, generator).to(context.device);
      if (config_.save_projection) {
        add_projection(context, "vera_A", config_.a);
        add_projection(context, "vera_B", config_.b);
      }
    }
    LinearMethod::attach_to(context, site);
  }
};

}  // namespace

void register_vera(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<Vera>(); }});
}

}  // namespace graft::peft
