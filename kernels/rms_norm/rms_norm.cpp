#include "kernels/rms_norm/rms_norm.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/device.h"
#include "kernels/element.h"

namespace graft::kernels {
namespace cpu {
template <class T>
void rms_norm(const T* x, const T* weight, T* y, float* rstd, int64_t rows, int64_t width,
              float epsilon);
template <class T>
void rms_norm_backward(const T* d_y, const T* x, const T* weight, const float* rstd, T* d_x,
                       int64_t rows, int64_t width);
}  // namespace cpu
namespace cuda {
template <class T>
void rms_norm(const T* x, const T* weight, T* y, float* rstd, int64_t rows, int64_t width,
              float epsilon, Stream stream);
template <class T>
void rms_norm_backward(const T* d_y, const T* x, const T* weight, const float* rstd, T* d_x,
                       int64_t rows, int64_t width, Stream stream);
}  // namespace cuda
namespace {

/// Rows a thread takes at least: 16384 elements, as LibTorch's own grain.
int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / width); }

/// Fills y [..., D] and rstd [rows] float32.
void forward_pass(const at::Tensor& x, const at::Tensor& weight, float epsilon, const at::Tensor& y,
                  const at::Tensor& rstd) {
  const int64_t width = weight.numel(), rows = rstd.numel();
  float* scale = rstd.mutable_data_ptr<float>();
  with_element(x, "rms_norm", [&](auto element) {
    using T = decltype(element);
    const T *in = elements<T>(x), *w = elements<T>(weight);
    T* out = mutable_elements<T>(y);
    on_device(
        x,
        [&] {
          at::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
            const int64_t first = begin * width;
            cpu::rms_norm(in + first, w, out + first, scale + begin, end - begin, width, epsilon);
          });
        },
        GRAFT_CUDA([&](Stream stream) {
          cuda::rms_norm(in, w, out, scale, rows, width, epsilon, stream);
        }));
  });
}

at::Tensor backward_pass(const at::Tensor& d_y, const at::Tensor& x, const at::Tensor& weight,
                         const at::Tensor& rstd) {
  const int64_t width = weight.numel(), rows = rstd.numel();
  const float* scale = rstd.const_data_ptr<float>();
  at::Tensor d_x = at::empty_like(x);
  with_element(x, "rms_norm", [&](auto element) {
    using T = decltype(element);
    const T *dy = elements<T>(d_y), *in = elements<T>(x), *w = elements<T>(weight);
    T* out = mutable_elements<T>(d_x);
    on_device(
        x,
        [&] {
          at::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
            const int64_t first = begin * width;
            cpu::rms_norm_backward(dy + first, in + first, w, scale + begin, out + first,
                                   end - begin, width);
          });
        },
        GRAFT_CUDA([&](Stream stream) {
          cuda::rms_norm_backward(dy, in, w, scale, out, rows, width, stream);
        }));
  });
  return d_x;
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& weight, double epsilon) {
    at::Tensor y = at::empty_like(x);
    const at::Tensor rstd = at::empty({x.numel() / weight.numel()}, x.options().dtype(at::kFloat));
    forward_pass(x, weight, static_cast<float>(epsilon), y, rstd);
    ctx->save_for_backward({x, weight, rstd});
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &rstd = saved[2];
    const at::Tensor d_y = grads[0].contiguous();
    at::Tensor d_x, d_weight;
    if (ctx->needs_input_grad(0)) d_x = backward_pass(d_y, x, weight, rstd);
    if (ctx->needs_input_grad(
            1)) {  // norm tuning only: composed, since a frozen weight is the rule
      const at::Tensor normalised = x.flatten(0, -2).to(at::kFloat) * rstd.unsqueeze(1);
      d_weight = (d_y.flatten(0, -2) * normalised).sum(0).to(weight.scalar_type());
    }
    return {d_x, d_weight, at::Tensor()};
  }
};

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon) {
  GRAFT_CHECK(
      x.dim() >= 1 && weight.dim() == 1 && weight.numel() > 0 && x.size(-1) == weight.numel(),
      "rms_norm needs x [..., D] and weight [D], got ", x.sizes(), " and ", weight.sizes());
  return RmsNorm::apply(x.contiguous(), weight.to(x.scalar_type()).contiguous(), epsilon);
}

}  // namespace graft::kernels
