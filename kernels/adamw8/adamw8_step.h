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
  /// value.
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

/// code() by a look-up, for a CPU: numbers that share sign, exponent and seven bits of the mantissa
/// have at most one midpoint among them. For |x| <= 1.
struct CodeTable {
  static constexpr uint32_t kLowest = 104u << 7;  ///< the key of 2^-23: every midpoint is larger
  static constexpr uint32_t kKeys = (127u << 7) - kLowest + 1;  ///< up to 1
  float midpoint[2 * kKeys];                                    ///< infinity: none
  uint8_t below[2 * kKeys];
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
struct MomentTables {
  CodeTable first, second;
};
void adamw_8bit(const AdamW8Piece& piece, const AdamWStep& step, const MomentMaps& maps,
                const MomentTables& tables);
}  // namespace cpu
namespace cuda {
void adamw_8bit(const AdamW8Piece* pieces, int64_t num_pieces, const AdamWStep& step,
                const MomentMaps& maps, Stream stream);
}  // namespace cuda
}  // namespace graft::kernels
