// Delta-LoRA: y = W_t x + s B A x, W_t = W_(t-1) + lambda s (B_t A_t - B_(t-1) A_(t-1)),
// s = alpha / r: the matrix follows the product of its factors, without a gradient of its own.
//   Zi et al. 2023, "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank
//   Matrices", arXiv:2309.02411, eq. 6 and alg. 1
// Trains A [r, in] (Kaiming-uniform, a = sqrt 5) and B [out, r] (zeros): the model is unchanged at
// step 0. Mergeable. The sum telescopes: W_t = W + lambda s (B_t A_t - B_K A_K), K = start_steps,
// so the base is never written (nor quantised again) and two pairs of factors, constants in a step
// and saved, stand for W_t. The paper has no dropout; there is no official code, and no library has
// it.
#include <ATen/ATen.h>

#include "kernels/lowrank/lowrank.h"
#include "peft/linear_method.h"
#include "peft/lora_fields.h"

namespace graft::peft {
namespace {

struct DeltaLoraConfig {
  Targets targets;
  int r = 8;
  double lora_alpha = 8, update_ratio = 2;
  int start_steps = 500;

  void fields(configs::Fields& f) {
    f("r", r, f.range(1, 4096), "rank, the inner size");
    f("lora_alpha", lora_alpha, f.positive().at_most(1e30), "scaled by lora_alpha / r");
    f("update_ratio", update_ratio, f.at_least(0).at_most(1e30),
      "lambda: how far the matrix follows; 0 is LoRA");
    f("start_steps", start_steps, f.at_least(0), "K: steps of plain LoRA before it does");
  }
  int rank(const LinearSite&) const { return r; }
};

class DeltaLoraLinear : public models::LinearAdapter {
 public:
  DeltaLoraLinear(const DeltaLoraConfig& c, const LinearSite& site, kernels::Key random,
                  at::Device device)
      : scale_(c.lora_alpha / c.r), delta_scale_(c.update_ratio * scale_) {
    LoraFields lora;
    lora.r = c.r;
    const auto [a, b] = lora.start(site, random, device);
    a_ = register_parameter("lora_a", a);
    b_ = register_parameter("lora_b", b);
    // [A_t; A_K] and [B_t, -B_K]: one product of rank 2 r
    delta_a_ = register_buffer("delta_a", at::cat({a, a}).detach().clone());
    delta_b_ = register_buffer("delta_b", at::cat({b, b}, 1).detach().clone());
  }
  static std::vector<Leaf> leaves() {
    return {{"lora_a", "lora_A.weight"},
            {"lora_b", "lora_B.weight"},
            {"delta_a", "delta_A"},
            {"delta_b", "delta_B"}};
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass&) override {
    const Tensor y = kernels::lowrank_add(base(x), x, delta_a_, delta_b_, delta_scale_);
    return kernels::lowrank_add(y, x, a_, b_, scale_);
  }
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override {
    return w + (delta_scale_ * delta_b_.mm(delta_a_) + scale_ * b_.mm(a_)).to(w.scalar_type());
  }

  /// Takes the factors of this step, and until K the matrix stays where it is.
  void follow(bool has_begun) const {
    const int64_t r = a_.size(0);
    delta_a_.slice(0, 0, r).copy_(a_);
    delta_b_.slice(1, 0, r).copy_(b_);
    if (has_begun) return;
    delta_a_.slice(0, r).copy_(a_);
    delta_b_.slice(1, r).copy_(b_.neg());
  }

 private:
  double scale_, delta_scale_;
  Tensor a_, b_, delta_a_, delta_b_;
};

class DeltaLora : public LinearMethod<DeltaLoraConfig, DeltaLoraLinear> {
 public:
  void after_step(const StepInfo& info) override {
    const at::NoGradGuard no_grad;
    for (const auto& adapter : adapters_) adapter->follow(info.step + 1 > config_.start_steps);
  }
};

}  // namespace

void register_delta_lora(MethodRegistry& registry, const MethodFacts& facts) {
  registry.add({facts.name, facts.summary, [] { return std::make_unique<DeltaLora>(); }});
}

}  // namespace graft::peft
