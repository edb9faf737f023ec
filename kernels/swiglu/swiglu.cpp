#include "kernels/swiglu/swiglu.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/device.h"
#include "kernels/element.h"

namespace graft::kernels {
namespace cpu {
template <class T>
void swiglu(const T* gate, const T* up, T* y, int64_t n);
template <class T>
void swiglu_backward(const T* d_y, const T* gate, const T* up, T* d_gate, T* d_up, int64_t n);
}  // namespace cpu
namespace cuda {
template <class T>
void swiglu(const T* gate, const T* up, T* y, int64_t n, Stream stream);
template <class T>
void swiglu_backward(const T* d_y, const T* gate, const T* up, T* d_gate, T* d_up, int64_t n,
                     Stream stream);
}  // namespace cuda
namespace {

constexpr int64_t kGrain = 16384;

at::Tensor forward_pass(const at::Tensor& gate, const at::Tensor& up) {
  at::Tensor y = at::empty_like(gate);
  with_element(gate, "swiglu", [&](auto element) {
    using T = decltype(element);
    const T *g = elements<T>(gate), *u = elements<T>(up);
    T* out = mutable_elements<T>(y);
    on_device(
        gate,
        [&] {
          at::parallel_for(0, y.numel(), kGrain, [&](int64_t begin, int64_t end) {
            cpu::swiglu(g + begin, u + begin, out + begin, end - begin);
          });
        },
        GRAFT_CUDA([&](Stream stream) { cuda::swiglu(g, u, out, y.numel(), stream); }));
  });
  return y;
}

torch::autograd::variable_list backward_pass(const at::Tensor& d_y, const at::Tensor& gate,
                                             const at::Tensor& up) {
  at::Tensor d_gate = at::empty_like(gate), d_up = at::empty_like(up);
  with_element(gate, "swiglu", [&](auto element) {
    using T = decltype(element);
    const T *dy = elements<T>(d_y), *g = elements<T>(gate), *u = elements<T>(up);
    T *dg = mutable_elements<T>(d_gate), *du = mutable_elements<T>(d_up);
    on_device(
        gate,
        [&] {
          at::parallel_for(0, d_y.numel(), kGrain, [&](int64_t begin, int64_t end) {
            cpu::swiglu_backward(dy + begin, g + begin, u + begin, dg + begin, du + begin,
                                 end - begin);
          });
        },
        GRAFT_CUDA(
            [&](Stream stream) { cuda::swiglu_backward(dy, g, u, dg, du, d_y.numel(), stream); }));
  });
  return {d_gate, d_up};
}

struct Swiglu : torch::autograd::Function<Swiglu> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& gate,
                            const at::Tensor& up) {
    ctx->save_for_backward({gate, up});
    return forward_pass(gate, up);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    return backward_pass(grads[0].contiguous(), saved[0], saved[1]);
  }
};

}  // namespace

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  GRAFT_CHECK(gate.sizes() == up.sizes() && gate.scalar_type() == up.scalar_type(),
              "swiglu needs gate and up alike, got ", gate.scalar_type(), gate.sizes(), " and ",
              up.scalar_type(), up.sizes());
  return Swiglu::apply(gate.contiguous(), up.contiguous());
}

}  // namespace graft::kernels
