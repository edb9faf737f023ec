#include "kernels/lowrank/lowrank.h"

#include <torch/csrc/autograd/custom_function.h>

#include "configs/check.h"
#include "kernels/gemm/gemm.h"

namespace graft::kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor rows(const at::Tensor& tensor) { return tensor.reshape({-1, tensor.size(-1)}); }

struct LowrankAdd : torch::autograd::Function<LowrankAdd> {
  static at::Tensor forward(AutogradContext* ctx, at::Tensor base_out, const at::Tensor& x,
                            const at::Tensor& a, const at::Tensor& b, double scale) {
    const at::Tensor a_cast = a.to(x.scalar_type()), b_cast = b.to(x.scalar_type());
    const at::Tensor inner = gemm(rows(x), a_cast.t());  // [N, r]
    base_out.view({-1, b.size(0)}).addmm_(inner, b_cast.t(), 1, scale);
    ctx->mark_dirty({base_out});
    // x is needed for the gradient of A alone
    ctx->save_for_backward({a.requires_grad() ? x : at::Tensor(), a_cast, b_cast, inner});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["a_type"] = static_cast<int64_t>(a.scalar_type());
    ctx->saved_data["b_type"] = static_cast<int64_t>(b.scalar_type());
    return base_out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &a = saved[1], &b = saved[2], &inner = saved[3];
    const double scale = ctx->saved_data["scale"].toDouble();
    const auto type = [&](const char* name) {
      return static_cast<at::ScalarType>(ctx->saved_data[name].toInt());
    };
    const at::Tensor d_y = rows(grads[0]);
    at::Tensor d_x, d_a, d_b;
    if (ctx->needs_input_grad(1) || ctx->needs_input_grad(2)) {
      const at::Tensor d_inner = gemm(d_y, b).mul_(scale);
      if (ctx->needs_input_grad(1)) {
        std::vector<int64_t> sizes = grads[0].sizes().vec();
        sizes.back() = a.size(1);
        d_x = gemm(d_inner, a).view(sizes);
      }
      if (ctx->needs_input_grad(2)) d_a = gemm(d_inner.t(), rows(x)).to(type("a_type"));
    }
    if (ctx->needs_input_grad(3)) {
      // As (inner^T dy)^T: the left side of a product is read in rows, and dy is the large one.
      d_b = gemm(inner.t(), d_y).t().to(type("b_type"), false, false, at::MemoryFormat::Contiguous);
      d_b.mul_(scale);
    }
    return {grads[0], d_x, d_a, d_b, at::Tensor()};
  }
};

}  // namespace

at::Tensor lowrank_add(at::Tensor base_out, const at::Tensor& x, const at::Tensor& a,
                       const at::Tensor& b, double scale) {
  GRAFT_CHECK(a.dim() == 2 && b.dim() == 2 && x.dim() >= 1 && a.size(0) == b.size(1) &&
                  x.size(-1) == a.size(1) && base_out.dim() == x.dim() &&
                  base_out.size(-1) == b.size(0) &&
                  base_out.sizes().slice(0, x.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
              "lowrank_add needs base_out [..., out], x [..., in], a [r, in], b [out, r], got ",
              base_out.sizes(), ", ", x.sizes(), ", ", a.sizes(), ", ", b.sizes());
  GRAFT_CHECK(base_out.scalar_type() == x.scalar_type() && base_out.is_contiguous(),
              "lowrank_add needs a contiguous base_out in the dtype of x (", x.scalar_type(),
              "), got ", base_out.scalar_type());
  return LowrankAdd::apply(std::move(base_out), x, a, b, scale);
}

}  // namespace graft::kernels
