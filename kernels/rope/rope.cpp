#include "kernels/rope/rope.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>

#include "kernels/device.h"
#include "kernels/element.h"

namespace graft::kernels {
namespace cpu {
template <class T>
void rope(const T* x, int64_t head_stride, const float* cos, const float* sin, float sign, T* y,
          int64_t heads, int64_t width);
}  // namespace cpu
namespace cuda {
template <class T>
void rope(const T* x, const int64_t* strides, const float* cos, const float* sin,
          int64_t table_stride, float sign, T* y, const int64_t* sizes, Stream stream);
}  // namespace cuda
namespace {

/// Turns every head by its angle times `sign`, 1 or -1.
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, float sign) {
  at::Tensor y = at::empty(x.sizes(), x.options());
  const int64_t length = x.size(1), heads = x.size(2), width = x.size(3);
  const int64_t table_stride = cos.dim() == 3 ? length * width : 0;  // from one sample to the next
  const float *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
  with_element(x, "rope", [&](auto element) {
    using T = decltype(element);
    const T* in = elements<T>(x);
    T* out = mutable_elements<T>(y);
    on_device(
        x,
        [&] {
          const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, heads * width));
          at::parallel_for(0, x.size(0) * length, grain, [&](int64_t begin, int64_t end) {
            for (int64_t token = begin; token < end; ++token) {
              const int64_t b = token / length, l = token % length;
              const int64_t angle = b * table_stride + l * width;
              cpu::rope(in + b * x.stride(0) + l * x.stride(1), x.stride(2), c + angle, s + angle,
                        sign, out + token * heads * width, heads, width);
            }
          });
        },
        GRAFT_CUDA([&](Stream stream) {
          cuda::rope(in, x.strides().data(), c, s, table_stride, sign, out, x.sizes().data(),
                     stream);
        }));
  });
  return y;
}

struct Rope : torch::autograd::Function<Rope> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& cos, const at::Tensor& sin) {
    ctx->save_for_backward({cos, sin});
    return rotate(x, cos, sin, 1);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor d_y = grads[0].stride(-1) == 1 ? grads[0] : grads[0].contiguous();
    return {rotate(d_y, saved[0], saved[1], -1), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  GRAFT_CHECK(x.dim() == 4 && x.size(3) % 2 == 0 && x.stride(3) == 1,
              "rope needs x [B, L, H, K] with an even, dense K, got ", x.sizes(), " with strides ",
              x.strides());
  const std::array<int64_t, 3> shape = {x.size(0), x.size(1), x.size(3)};
  const at::IntArrayRef per_sample(shape), shared = per_sample.slice(1);
  for (const at::Tensor& table : {cos, sin}) {
    GRAFT_CHECK(table.scalar_type() == at::kFloat &&
                    (table.sizes() == shared || table.sizes() == per_sample),
                "rope needs float32 tables [L, K] or [B, L, K] for x ", x.sizes(), ", got ",
                table.scalar_type(), table.sizes());
  }
  GRAFT_CHECK(cos.dim() == sin.dim(), "rope got cos ", cos.sizes(), " and sin ", sin.sizes());
  return Rope::apply(x, cos.contiguous(), sin.contiguous());
}

}  // namespace graft::kernels
