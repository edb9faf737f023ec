#include <cstring>

#include "kernels/int8/rows.h"
#include "kernels/lanes.h"
#include "kernels/magnitude.h"

namespace graft::kernels::cpu {

using ByteLanes = int8_t __attribute__((vector_size(16)));

void quantize_int8(const float* values, int64_t cols, int8_t* codes, float* absmax, int64_t begin,
                   int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* from = values + row * cols;
    absmax[row] = largest_magnitude(from, cols);
    const float factor = int8_factor(absmax[row]);
    for (int64_t i = 0; i < cols; ++i) {
      codes[row * cols + i] = static_cast<int8_t>(static_cast<int32_t>(rintf(from[i] * factor)));
    }
  }
}

template <class T>
void dequantize_int8(const int8_t* codes, const float* absmax, int64_t cols, T* out, int64_t begin,
                     int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float scale = absmax[row];
    for_lanes(cols, [&](int64_t i, int count) {
      ByteLanes from{};
      std::memcpy(&from, codes + row * cols + i, count);
      store(out + row * cols + i, __builtin_convertvector(from, Lanes) * scale * kOver127, count);
    });
  }
}

template void dequantize_int8(const int8_t*, const float*, int64_t, float*, int64_t, int64_t);
template void dequantize_int8(const int8_t*, const float*, int64_t, Bfloat16*, int64_t, int64_t);

}  // namespace graft::kernels::cpu
