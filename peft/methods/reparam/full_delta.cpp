// Full delta: y = (W + D) x + b + d, a dense update of the matrix.
//   LyCORIS's `full`, Yeh et al. 2023, arXiv:2309.14859, sec. 3; "native fine-tuning" there
// Trains D [out, in] and, where the matrix has a bias, d [out]; zeros: the model is unchanged at
// step 0. Mergeable where there is no bias. The base stays as it is stored, so a 4-bit one is tuned
// in full at the price of its matrices in float32, with gradients and moments, on every rank: for
// a few slots. No HF PEFT type; files in LyCORIS's form (diff, diff_b) are read and written by
// `graft export`.
#include <ATen/ATen.h>

#include "peft/linear_method.h"

namespace graft::peft {
namespace {

struct FullDeltaConfig {
  Targets targets;

  void fields(configs::Fields&) {}
};

class FullDeltaLinear : public models::LinearAdapter {
 public:
  FullDeltaLinear(const FullDeltaConfig&, const LinearSite& site, kernels::Key, at::Device device) {
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    diff_ = register_parameter("diff", at::zeros({site.info.out, site.info.in}, options));
    if (site.info.has_bias)
      diff_b_ = register_parameter("diff_b", at::zeros({site.info.out}, options));
  }
  static std::vector<Leaf> leaves() { return {{"diff", "diff"}, {"diff_b", "diff_b"}}; }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    const Tensor y = base(x), update = at::linear(x, diff_.to(x.scalar_type()));
    return y + (diff_b_.defined() ? update + diff_b_ : update).to(y.scalar_type());
  }
  bool mergeable() const override { return !diff_b_.defined(); }
  Tensor merged(const Tensor& w) const override { return w + diff_.to(w.scalar_type()); }

 private:
  Tensor diff_, diff_b_;
};

}  // namespace

void register_full_delta(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<FullDeltaConfig, FullDeltaLinear>>(); }});
}

}  // namespace graft::peft
