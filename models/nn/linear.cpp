#include "models/nn/linear.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/gemm/gemm.h"

namespace graft::models {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// The leaf of a weight that is trained.
std::optional<Tensor> leaf_of(const Weight& weight) {
  return weight.is_trained() ? std::optional(weight.leaf()) : std::nullopt;
}

/// What autograd can save of a handle is a number.
void save_weight(AutogradContext* ctx, const Weight* weight) {
  ctx->saved_data["weight"] = reinterpret_cast<int64_t>(weight);
}
const Weight& saved_weight(AutogradContext* ctx) {
  // NOLINTNEXTLINE(performance-no-int-to-ptr)
  return *reinterpret_cast<const Weight*>(ctx->saved_data["weight"].toInt());
}

struct BaseLinear : torch::autograd::Function<BaseLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& leaf,
                        const Weight* weight) {
    save_weight(ctx, weight);
    if (leaf) ctx->save_for_backward({x});
    return kernels::gemm_linear(x, weight->dense());
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor& dy = grads[0];
    Tensor dx, dw;
    if (ctx->needs_input_grad(0)) dx = kernels::gemm_linear(dy, saved_weight(ctx).dense().t());
    // Without a leaf the weight is no input that autograd knows.
    if (saved_weight(ctx).is_trained() && ctx->needs_input_grad(1)) {
      const Tensor x = ctx->get_saved_variables()[0];
      dw = kernels::gemm(dy.flatten(0, -2).t(), x.flatten(0, -2)).to(at::kFloat);
    }
    return {dx, dw, Tensor()};
  }
};

/// Rows of a table that is trained.
struct TrainedRows : torch::autograd::Function<TrainedRows> {
  static Tensor forward(AutogradContext* ctx, const Tensor& /*leaf*/, const Tensor& ids,
                        const Weight* weight) {
    save_weight(ctx, weight);
    ctx->save_for_backward({ids});
    return weight->rows(ids);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor ids = ctx->get_saved_variables()[0];
    const int64_t num_rows = saved_weight(ctx).shape().front();
    return {at::embedding_dense_backward(grads[0].to(at::kFloat), ids, num_rows, -1, false),
            Tensor(), Tensor()};
  }
};

class EmbeddingOp : public LinearOp {
 public:
  explicit EmbeddingOp(const Weight& weight) : weight_(weight) {}
  Tensor operator()(const Tensor& ids) const override {
    return weight_.is_trained() ? TrainedRows::apply(weight_.leaf(), ids, &weight_)
                                : weight_.rows(ids);
  }
  Tensor weight() const override { return weight_.dense_to_keep(); }

 private:
  const Weight& weight_;
};

}  // namespace

Linear::Linear(std::string name, int64_t in, int64_t out, bool has_bias, WeightUse use)
    : info{std::move(name), in, out, has_bias, LinearKind::kLinear}, weight({out, in}, use) {
  if (has_bias) bias = Weight({out}, WeightUse::kVector);
}

Tensor Linear::operator()(const Tensor& x, const Pass& pass) const {
  const BaseLinearOp base(weight, bias);
  return slot.empty() ? base(x) : run(slot, base, x, pass);
}

Embedding::Embedding(std::string name, int64_t rows, int64_t width)
    : info{std::move(name), rows, width, false, LinearKind::kEmbedding},
      weight({rows, width}, WeightUse::kTable) {}

Tensor Embedding::operator()(const Tensor& ids, const Pass& pass) const {
  const EmbeddingOp base(weight);
  return slot.empty() ? base(ids) : run(slot, base, ids, pass);
}

Tensor base_linear(const Tensor& x, const Weight& weight, const Weight& bias) {
  const Tensor y = BaseLinear::apply(x, leaf_of(weight), &weight);
  return bias.defined() ? y + bias.value() : y;
}

}  // namespace graft::models
