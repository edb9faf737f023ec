// What the two back ends of adamw are handed: scalars of a step, and a piece of one parameter.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/device.h"

namespace graft::kernels {

struct AdamWStep {
  float decay;  // 1 - lr wd
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;        // lr / (1 - beta1^t)
  float sqrt_correction;  // sqrt(1 - beta2^t)
  float epsilon;
};

struct AdamWConfig;
/// @param step  number of this step, from 1
AdamWStep adamw_step(const AdamWConfig& config, int64_t step);

/// One element's step, on a GPU; the CPU's loop spells the same in lanes.
__host__ __device__ inline void step_element(float& p, float g, float& m, float& v,
                                             const AdamWStep& step) {
  m = m + (g - m) * step.one_minus_beta1;
  v = v * step.beta2 + g * g * step.one_minus_beta2;
  const float denominator = sqrtf(v) / step.sqrt_correction + step.epsilon;
  p = p * step.decay - step.step_size * m / denominator;
}

struct AdamWPiece {
  float* parameter;
  const float* gradient;
  float* first_moment;
  float* second_moment;
  int64_t size;
};

namespace cpu {
void adamw(const AdamWPiece& piece, const AdamWStep& step);
double sum_of_squares(const float* values, int64_t size);
}  // namespace cpu
namespace cuda {
void adamw(const AdamWPiece* pieces, int64_t num_pieces, const AdamWStep& step, Stream stream);
void sum_of_squares(const float* values, int64_t size, int64_t piece, double* sums, Stream stream);
}  // namespace cuda
}  // namespace graft::kernels
