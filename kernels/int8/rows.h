// What both back ends of kernels/int8 share: the arithmetic of one element, and their declarations.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/bfloat16.h"
#include "kernels/device.h"

namespace graft::kernels {

constexpr float kOver127 = 7.874015718698502e-3f;

/// What a row's values are multiplied by: 0 for a row of zeros, finite for the smallest absmax.
__host__ __device__ inline float int8_factor(float absmax) {
  return absmax > 0 ? fminf(127.0f / absmax, 3.4028234664e38f) : 0.0f;
}

namespace cpu {

/// Rows [begin, end) of `values` [rows, cols].
void quantize_int8(const float* values, int64_t cols, int8_t* codes, float* absmax, int64_t begin,
                   int64_t end);
template <class T>
void dequantize_int8(const int8_t* codes, const float* absmax, int64_t cols, T* out, int64_t begin,
                     int64_t end);

}  // namespace cpu

namespace cuda {

void quantize_int8(const float* values, int64_t rows, int64_t cols, int8_t* codes, float* absmax,
                   Stream stream);
template <class T>
void dequantize_int8(const int8_t* codes, const float* absmax, int64_t rows, int64_t cols, T* out,
                     Stream stream);

}  // namespace cuda
}  // namespace graft::kernels
