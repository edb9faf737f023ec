#include "kernels/block.cuh"
#include "kernels/device.h"

namespace graft::kernels::cuda {
namespace {

struct Layout {
  int64_t length, heads, half;
  int64_t batch_stride, length_stride, head_stride, table_stride;
};

/// One block a token, its threads over the pairs of all heads.
template <class T>
__global__ void rope_kernel(const T* x, const float* cos, const float* sin, float sign, T* y,
                            Layout at) {
  const int64_t b = blockIdx.x / at.length, l = blockIdx.x % at.length, width = 2 * at.half;
  x += b * at.batch_stride + l * at.length_stride;
  y += blockIdx.x * at.heads * width;
  cos += b * at.table_stride + l * width;
  sin += b * at.table_stride + l * width;
  for (int64_t pair = threadIdx.x; pair < at.heads * at.half; pair += blockDim.x) {
    const int64_t head = pair / at.half, i = pair % at.half;
    const T* in = x + head * at.head_stride + i;
    T* out = y + head * width + i;
    const float c = cos[i], s = sin[i] * sign, first = widen(in[0]), second = widen(in[at.half]);
    out[0] = narrow<T>(first * c - second * s);
    out[at.half] = narrow<T>(second * c + first * s);
  }
}

}  // namespace

template <class T>
void rope(const T* x, const int64_t* strides, const float* cos, const float* sin,
          int64_t table_stride, float sign, T* y, const int64_t* sizes, Stream stream) {
  const int64_t tokens = sizes[0] * sizes[1];
  if (tokens == 0) return;
  const Layout at{sizes[1],   sizes[2],   sizes[3] / 2, strides[0],
                  strides[1], strides[2], table_stride};
  rope_kernel<<<tokens, 256, 0, stream>>>(x, cos, sin, sign, y, at);
  CUDA_CHECK(cudaGetLastError());
}

template void rope(const float*, const int64_t*, const float*, const float*, int64_t, float, float*,
                   const int64_t*, Stream);
template void rope(const Bfloat16*, const int64_t*, const float*, const float*, int64_t, float,
                   Bfloat16*, const int64_t*, Stream);

}  // namespace graft::kernels::cuda
