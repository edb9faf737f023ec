// What the CUDA kernels of a row share: element conversion, and reductions over a block of threads
// whose order is fixed, so that the bits repeat.
#pragma once

#include <cuda_bf16.h>

#include "kernels/bfloat16.h"

namespace graft::kernels::cuda {

constexpr int kWarp = 32;

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(Bfloat16 value) {
  return __uint_as_float(unsigned(value.bits) << 16);
}

template <class T>
__device__ T narrow(float value);
template <>
__device__ inline float narrow<float>(float value) {
  return value;
}
template <>
__device__ inline Bfloat16 narrow<Bfloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

/// Combines one value a thread into one for all; blockDim.x is a multiple of kWarp. Every thread
/// gets the result.
template <class T, class Combine>
__device__ T block_reduce(T value, T neutral, Combine combine) {
  __shared__ T of_warp[kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  __syncthreads();  // an earlier call may still be reading of_warp
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  value = lane < blockDim.x / kWarp ? of_warp[lane] : neutral;
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

template <class T>
__device__ T block_sum(T value) {
  return block_reduce(value, T(0), [](T a, T b) { return a + b; });
}

__device__ inline float block_max(float value) {
  return block_reduce(value, -INFINITY, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace graft::kernels::cuda
