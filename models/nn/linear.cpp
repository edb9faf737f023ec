#include "models/nn/linear.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/gemm/gemm.h"

namespace graft::models {
namespace {

struct FrozenLinear : torch::autograd::Function<FrozenLinear> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x,
                        const Weight* weight, const Weight* bias) {
    ctx->saved_data["weight"] = reinterpret_cast<int64_t>(weight);
    const Tensor y = kernels::gemm_linear(x, weight->dense());
    return bias->defined() ? y + bias->dense() : y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list dy) {
    // NOLINTNEXTLINE(performance-no-int-to-ptr): what autograd can save of a handle is a number
    const auto* weight = reinterpret_cast<const Weight*>(ctx->saved_data["weight"].toInt());
    return {kernels::gemm_linear(dy[0], weight->dense().t()), Tensor(), Tensor()};
  }
};

class EmbeddingOp : public LinearOp {
 public:
  explicit EmbeddingOp(const Weight& weight) : weight_(weight) {}
  Tensor operator()(const Tensor& ids) const override { return weight_.rows(ids); }
  Tensor weight() const override { return weight_.dense(); }

 private:
  const Weight& weight_;
};

}  // namespace

Linear::Linear(std::string name, int64_t in, int64_t out, bool has_bias, WeightUse use)
    : info{std::move(name), in, out, has_bias, LinearKind::kLinear}, weight({out, in}, use) {
  if (has_bias) bias = Weight({out}, WeightUse::kVector);
}

Tensor Linear::operator()(const Tensor& x, const Pass& pass) const {
  const FrozenLinearOp base(weight, bias);
  return slot.empty() ? base(x) : run(slot, base, x, pass);
}

Embedding::Embedding(std::string name, int64_t rows, int64_t width)
    : info{std::move(name), rows, width, false, LinearKind::kEmbedding},
      weight({rows, width}, WeightUse::kTable) {}

Tensor Embedding::operator()(const Tensor& ids, const Pass& pass) const {
  const EmbeddingOp base(weight);
  return slot.empty() ? base(ids) : run(slot, base, ids, pass);
}

Tensor frozen_linear(const Tensor& x, const Weight& weight, const Weight& bias) {
  return FrozenLinear::apply(x, &weight, &bias);
}

}  // namespace graft::models
