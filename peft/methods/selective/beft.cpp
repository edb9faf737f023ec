// BEFT: y = W x + b + d.               Huang et al. 2025, arXiv:2509.15974
// Trains d [1, out] beside the frozen bias, if there is one; zeros: the model is unchanged at step
// 0. Merged exactly where the base has a bias to add d to. Fields and files are those of HF PEFT's
// BeftConfig. The paper compares the biases of queries, keys and values and finds the last the most
// effective: those are the default.
#include <ATen/ATen.h>

#include "kernels/random/random.h"
#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct BeftConfig {
  Targets targets{.modules = {"attn.v"}};
  bool init_weights = true;

  void fields(configs::Fields& f) {
    f("init_weights", init_weights, "start from zeros, the base; false: from N(0, 1)");
  }
  static PeftForm peft_form() { return {.type = "BEFT"}; }
  bool starts_as_base() const { return init_weights; }
};

class BeftLinear : public models::LinearAdapter {
 public:
  BeftLinear(const BeftConfig& c, const LinearSite& site, kernels::Key random, at::Device device) {
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    const Tensor d = at::zeros({1, site.info.out}, options);
    if (!c.init_weights) kernels::normal(d, random);
    d_ = register_parameter("d", d);
  }
  static std::vector<Leaf> leaves() { return {{"d", "beft_bias"}}; }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    const Tensor y = base(x);
    return (y + d_.view({-1})).to(y.scalar_type());  // summed in float32, as PEFT does
  }
  Tensor merged_bias(const Tensor& b) const override {
    return b + d_.view({-1}).to(b.scalar_type());
  }

 private:
  Tensor d_;
};

}  // namespace

void register_beft(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<BeftConfig, BeftLinear>>(); }});
}

}  // namespace graft::peft
