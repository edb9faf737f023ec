#include "kernels/block.cuh"
#include "kernels/int8/rows.h"

namespace graft::kernels::cuda {
namespace {

constexpr int kThreads = 256;

/// One thread block a row. Magnitudes are compared as bits, so that a NaN is the largest of all.
__global__ void quantize_kernel(const float* values, int64_t cols, int8_t* codes, float* absmax) {
  __shared__ uint32_t largest;
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  const float* from = values + blockIdx.x * cols;
  uint32_t mine = 0;
  for (int64_t i = threadIdx.x; i < cols; i += kThreads) {
    mine = max(mine, __float_as_uint(from[i]) & 0x7fffffffu);
  }
  atomicMax(&largest, __reduce_max_sync(0xffffffffu, mine));
  __syncthreads();
  const float factor = int8_factor(__uint_as_float(largest));
  if (threadIdx.x == 0) absmax[blockIdx.x] = __uint_as_float(largest);
  for (int64_t i = threadIdx.x; i < cols; i += kThreads) {
    codes[blockIdx.x * cols + i] = int8_t(int32_t(rintf(from[i] * factor)));
  }
}

template <class T>
__global__ void dequantize_kernel(const int8_t* codes, const float* absmax, int64_t cols, T* out) {
  const float scale = absmax[blockIdx.x];
  for (int64_t i = threadIdx.x; i < cols; i += kThreads) {
    const int64_t at = blockIdx.x * cols + i;
    out[at] = narrow<T>(float(codes[at]) * scale * kOver127);
  }
}

}  // namespace

void quantize_int8(const float* values, int64_t rows, int64_t cols, int8_t* codes, float* absmax,
                   Stream stream) {
  quantize_kernel<<<rows, kThreads, 0, stream>>>(values, cols, codes, absmax);
  CUDA_CHECK(cudaGetLastError());
}

template <class T>
void dequantize_int8(const int8_t* codes, const float* absmax, int64_t rows, int64_t cols, T* out,
                     Stream stream) {
  if (rows == 0) return;
  dequantize_kernel<<<rows, kThreads, 0, stream>>>(codes, absmax, cols, out);
  CUDA_CHECK(cudaGetLastError());
}

template void dequantize_int8(const int8_t*, const float*, int64_t, int64_t, float*, Stream);
template void dequantize_int8(const int8_t*, const float*, int64_t, int64_t, Bfloat16*, Stream);

}  // namespace graft::kernels::cuda
