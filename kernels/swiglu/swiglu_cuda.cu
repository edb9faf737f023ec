#include <algorithm>

#include "kernels/block.cuh"
#include "kernels/device.h"

namespace graft::kernels::cuda {
namespace {

constexpr int kThreads = 256;

int num_blocks(int64_t n) { return int(std::min<int64_t>((n + kThreads - 1) / kThreads, 8192)); }

template <class T>
__global__ void forward_kernel(const T* gate, const T* up, T* y, int64_t n) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
    const float g = widen(gate[i]);
    y[i] = narrow<T>(g / (1.0F + expf(-g)) * widen(up[i]));
  }
}

template <class T>
__global__ void backward_kernel(const T* d_y, const T* gate, const T* up, T* d_gate, T* d_up,
                                int64_t n) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
    const float dy = widen(d_y[i]), g = widen(gate[i]);
    const float sigmoid = 1.0F / (1.0F + expf(-g));
    d_gate[i] = narrow<T>(dy * widen(up[i]) * sigmoid * (1.0F + g * (1.0F - sigmoid)));
    d_up[i] = narrow<T>(dy * g * sigmoid);
  }
}

}  // namespace

template <class T>
void swiglu(const T* gate, const T* up, T* y, int64_t n, Stream stream) {
  if (n == 0) return;
  forward_kernel<<<num_blocks(n), kThreads, 0, stream>>>(gate, up, y, n);
  CUDA_CHECK(cudaGetLastError());
}

template <class T>
void swiglu_backward(const T* d_y, const T* gate, const T* up, T* d_gate, T* d_up, int64_t n,
                     Stream stream) {
  if (n == 0) return;
  backward_kernel<<<num_blocks(n), kThreads, 0, stream>>>(d_y, gate, up, d_gate, d_up, n);
  CUDA_CHECK(cudaGetLastError());
}

template void swiglu(const float*, const float*, float*, int64_t, Stream);
template void swiglu(const Bfloat16*, const Bfloat16*, Bfloat16*, int64_t, Stream);
template void swiglu_backward(const float*, const float*, const float*, float*, float*, int64_t,
                              Stream);
template void swiglu_backward(const Bfloat16*, const Bfloat16*, const Bfloat16*, Bfloat16*,
                              Bfloat16*, int64_t, Stream);

}  // namespace graft::kernels::cuda
