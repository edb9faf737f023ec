// The living skeleton of a method: copy it to methods/<group>/<name>.cpp and change what you need.
// It is compiled into the tests only and meets the whole contract (tests/peft/contract_test.cpp),
// so what it shows is always true.
//
// A method file opens like this, with the formula, the paper and what is trained:
// Example: y = l * (W x + b).      After (IA)^3, Liu et al. 2022, arXiv:2205.05638, sec. 3.3
//
// Trains l [out], ones: the model is unchanged at step 0. Mergeable where the matrix has no bias.
#include <ATen/ATen.h>

#include "peft/linear_method.h"

namespace graft::peft {
namespace {

// 1. What a user may write. The initialisers are the defaults; fields() gives each one its bounds
// and one line of help. Reading, validation, `graft methods` and the editor schema come from it.
struct ExampleConfig {
  Targets targets;
  double initial_factor = 1;

  void fields(configs::Fields& f) {
    f("initial_factor", initial_factor, f.positive(),
      "the factors' first value; 1 leaves the model as it is");
  }
};

// 2. What happens at one slot. Parameters are float32 leaves of their own; nothing else is trained.
class ExampleLinear : public models::LinearAdapter {
 public:
  static constexpr bool kAdaptsEmbeddings = true;

  ExampleLinear(const ExampleConfig& c, const LinearSite& site, kernels::Key /*random*/,
                at::Device device)
      : info_(site.info) {
    // `random` is this slot's own key: kernels::uniform(t, random) draws the same values on every
    // rank.
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    l_ = register_parameter("l", at::full({site.info.out}, c.initial_factor, options));
  }

  // Our names, and what follows the module's path in PEFT's files; none where PEFT has no such
  // method.
  static std::vector<Leaf> leaves() { return {}; }

  // Around advice: call base(x) once, not at all, or on another x. The result has the dtype of
  // base(x).
  Tensor forward(const Tensor& x, const models::LinearOp& base,
                 const models::Pass& /*pass*/) override {
    const Tensor y = base(x);
    return y * l_.to(y.scalar_type());
  }

  // Optional: the matrix that alone does the same. An embedding's is [V, D], all others are [out,
  // in].
  bool mergeable() const override { return !info_.has_bias; }
  Tensor merged(const Tensor& w) const override {
    const bool embedding = info_.kind == models::LinearKind::kEmbedding;
    return w * (embedding ? l_ : l_.unsqueeze(1)).to(w.scalar_type());
  }

 private:
  models::LinearInfo info_;
  Tensor l_;
};

}  // namespace

// 3. How it is found: one line METHOD(example, group, "arXiv:...", "y = l * (W x + b)") in
// methods.def. LinearMethod puts the adapter on every matched linear; derive from it to act at
// points of a step, to read and write PEFT's adapter_config.json, or from Method itself for the
// other slots.
void register_example(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary,
                [] { return std::make_unique<LinearMethod<ExampleConfig, ExampleLinear>>(); }});
}

}  // namespace graft::peft
