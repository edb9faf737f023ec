#include "kernels/lanes.h"

namespace graft::kernels::cpu {

/// All heads of one token.
template <class T>
void rope(const T* x, int64_t head_stride, const float* cos, const float* sin, float sign, T* y,
          int64_t heads, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t head = 0; head < heads; ++head, x += head_stride, y += width) {
    for_lanes(half, [=](int64_t i, auto count) {
      const Lanes c = load(cos + i, count), s = load(sin + i, count) * sign;
      const Lanes first = load(x + i, count), second = load(x + half + i, count);
      store(y + i, first * c - second * s, count);
      store(y + half + i, second * c + first * s, count);
    });
  }
}

template void rope(const float*, int64_t, const float*, const float*, float, float*, int64_t,
                   int64_t);
template void rope(const Bfloat16*, int64_t, const float*, const float*, float, Bfloat16*, int64_t,
                   int64_t);

}  // namespace graft::kernels::cpu
