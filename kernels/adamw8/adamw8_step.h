// What the two back ends of adamw8 are handed, and how a number becomes a code: the same lines for
// both.
#pragma once

#include <cstdint>

#include "kernels/adamw/adamw_step.h"
#include "kernels/device.h"

namespace graft::kernels {

/// 256 values, sorted upwards, and the midpoints between neighbours.
struct ByteMap {
  float values[256];
  float thresholds[255];

  /// The code of the nearest value, which is how many midpoints lie below x: a tie takes the lower
  /// value, NaN the first.
  __host__ __device__ uint8_t code(float x) const {
    int below = 0;
    for (int half = 128; half > 0; half /= 2) {
      below += thresholds[below + half - 1] < x ? half : 0;
    }
    return static_cast<uint8_t>(below);
  }
};

struct MomentMaps {
  ByteMap first, second;
};

/// Blocks of one parameter; their absmax stand side by side.
struct AdamW8Piece {
  float* parameter;
  const float* gradient;
  uint8_t* first_codes;
  float* first_absmax;
  uint8_t* second_codes;
  float* second_absmax;
  int64_t size;
};

/// What a block's elements are multiplied by before they are encoded. bitsandbytes divides by no
/// less than 1e-38, so zeros stay zeros.
__host__ __device__ inline float encoding_factor(float absmax) {
  return 1.0f / (absmax > 1e-38f ? absmax : 1e-38f);
}

namespace cpu {
void adamw_8bit(const AdamW8Piece& piece, const AdamWStep& step, const MomentMaps& maps);
}  // namespace cpu
namespace cuda {
void adamw_8bit(const AdamW8Piece* pieces, int64_t num_pieces, const AdamWStep& step,
                const MomentMaps& maps, Stream stream);
}  // namespace cuda
}  // namespace graft::kernels
