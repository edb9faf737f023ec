#include <cmath>

#include "kernels/lanes.h"

namespace graft::kernels::cpu {

template <class T>
void rms_norm(const T* x, const T* weight, T* y, float* rstd, int64_t rows, int64_t width,
              float epsilon) {
  for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
    Lanes squares{};
    for_lanes(width, [&](int64_t i, auto count) {
      const Lanes v = load(x + i, count);
      squares += v * v;
    });
    const float scale = 1.0F / std::sqrt(sum(squares) / static_cast<float>(width) + epsilon);
    rstd[row] = scale;
    for_lanes(width, [=](int64_t i, auto count) {
      const Lanes normalised = round_to<T>(load(x + i, count) * scale);
      store(y + i, normalised * load(weight + i, count), count);
    });
  }
}

template <class T>
void rms_norm_backward(const T* d_y, const T* x, const T* weight, const float* rstd, T* d_x,
                       int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, d_y += width, x += width, d_x += width) {
    const float scale = rstd[row];
    Lanes products{};
    for_lanes(width, [&](int64_t i, auto count) {
      products += load(d_y + i, count) * load(weight + i, count) * load(x + i, count);
    });
    // d_x = rstd * (g - n * mean(g * n)) with g = d_y * weight and n = x * rstd.
    const float along_x = sum(products) * scale * scale / static_cast<float>(width);
    for_lanes(width, [=](int64_t i, auto count) {
      const Lanes g = load(d_y + i, count) * load(weight + i, count);
      store(d_x + i, scale * (g - load(x + i, count) * along_x), count);
    });
  }
}

template void rms_norm(const float*, const float*, float*, float*, int64_t, int64_t, float);
template void rms_norm(const Bfloat16*, const Bfloat16*, Bfloat16*, float*, int64_t, int64_t,
                       float);
template void rms_norm_backward(const float*, const float*, const float*, const float*, float*,
                                int64_t, int64_t);
template void rms_norm_backward(const Bfloat16*, const Bfloat16*, const Bfloat16*, const float*,
                                Bfloat16*, int64_t, int64_t);

}  // namespace graft::kernels::cpu
