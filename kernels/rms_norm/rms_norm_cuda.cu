#include "kernels/block.cuh"
#include "kernels/device.h"

namespace graft::kernels::cuda {
namespace {

constexpr int kThreads = 256;  // one block a row

template <class T>
__global__ void forward_kernel(const T* x, const T* weight, T* y, float* rstd, int64_t width,
                               float epsilon) {
  x += blockIdx.x * width;
  y += blockIdx.x * width;
  float squares = 0;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) squares += widen(x[i]) * widen(x[i]);
  const float scale = rsqrtf(block_sum(squares) / float(width) + epsilon);
  if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    const float normalised = widen(narrow<T>(widen(x[i]) * scale));
    y[i] = narrow<T>(normalised * widen(weight[i]));
  }
}

template <class T>
__global__ void backward_kernel(const T* d_y, const T* x, const T* weight, const float* rstd,
                                T* d_x, int64_t width) {
  d_y += blockIdx.x * width;
  x += blockIdx.x * width;
  d_x += blockIdx.x * width;
  const float scale = rstd[blockIdx.x];
  float products = 0;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    products += widen(d_y[i]) * widen(weight[i]) * widen(x[i]);
  }
  const float along_x = block_sum(products) * scale * scale / float(width);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    d_x[i] = narrow<T>(scale * (widen(d_y[i]) * widen(weight[i]) - widen(x[i]) * along_x));
  }
}

}  // namespace

template <class T>
void rms_norm(const T* x, const T* weight, T* y, float* rstd, int64_t rows, int64_t width,
              float epsilon, Stream stream) {
  if (rows == 0) return;
  forward_kernel<<<rows, kThreads, 0, stream>>>(x, weight, y, rstd, width, epsilon);
  CUDA_CHECK(cudaGetLastError());
}

template <class T>
void rms_norm_backward(const T* d_y, const T* x, const T* weight, const float* rstd, T* d_x,
                       int64_t rows, int64_t width, Stream stream) {
  if (rows == 0) return;
  backward_kernel<<<rows, kThreads, 0, stream>>>(d_y, x, weight, rstd, d_x, width);
  CUDA_CHECK(cudaGetLastError());
}

template void rms_norm(const float*, const float*, float*, float*, int64_t, int64_t, float, Stream);
template void rms_norm(const Bfloat16*, const Bfloat16*, Bfloat16*, float*, int64_t, int64_t, float,
                       Stream);
template void rms_norm_backward(const float*, const float*, const float*, const float*, float*,
                                int64_t, int64_t, Stream);
template void rms_norm_backward(const Bfloat16*, const Bfloat16*, const Bfloat16*, const float*,
                                Bfloat16*, int64_t, int64_t, Stream);

}  // namespace graft::kernels::cuda
