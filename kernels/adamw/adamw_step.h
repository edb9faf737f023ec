// What the two back ends of adamw are handed: scalars of a step, and a piece of one parameter.
#pragma once

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
