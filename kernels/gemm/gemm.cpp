#include "kernels/gemm/gemm.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace graft::kernels {
namespace {

/// LibTorch's linear over oneDNN. It has no C++ function, only its name among the operators.
at::Tensor onednn_linear(const at::Tensor& x, const at::Tensor& w) {
  using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                            c10::string_view, c10::List<std::optional<at::Scalar>>,
                            std::optional<c10::string_view>);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
                             .typed<Linear>();
  return op.call(x, w, std::nullopt, "none", c10::List<std::optional<at::Scalar>>(), "");
}

}  // namespace

at::Tensor gemm(const at::Tensor& a, const at::Tensor& b) {
  const bool has_work = a.numel() > 0 && b.numel() > 0;
  if (a.is_cpu() && a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat && has_work) {
    // Of a part of a wider matrix oneDNN has a reference implementation only, 1,000 times slower.
    const bool is_whole = b.is_contiguous() || b.t().is_contiguous();
    return onednn_linear(a.contiguous(), is_whole ? b.t() : b.t().contiguous());
  }
  return at::mm(a, b);
}

at::Tensor gemm_linear(const at::Tensor& x, const at::Tensor& w) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = w.size(0);
  // Not view(): the product is this function's own, and autograd would forbid its users to add to
  // it in place.
  return at::_unsafe_view(gemm(x.reshape({-1, x.size(-1)}), w.t()), sizes);
}

}  // namespace graft::kernels
