#include "kernels/lanes.h"

namespace graft::kernels::cpu {

template <class T>
void swiglu(const T* gate, const T* up, T* y, int64_t n) {
  for_lanes(n, [=](int64_t i, auto count) {
    const Lanes g = load(gate + i, count);
    store(y + i, g / (1.0F + exp(-g)) * load(up + i, count), count);
  });
}

template <class T>
void swiglu_backward(const T* d_y, const T* gate, const T* up, T* d_gate, T* d_up, int64_t n) {
  for_lanes(n, [=](int64_t i, auto count) {
    const Lanes dy = load(d_y + i, count), g = load(gate + i, count), u = load(up + i, count);
    const Lanes sigmoid = 1.0F / (1.0F + exp(-g));
    store(d_gate + i, dy * u * sigmoid * (1.0F + g * (1.0F - sigmoid)), count);
    store(d_up + i, dy * g * sigmoid, count);
  });
}

template void swiglu(const float*, const float*, float*, int64_t);
template void swiglu(const Bfloat16*, const Bfloat16*, Bfloat16*, int64_t);
template void swiglu_backward(const float*, const float*, const float*, float*, float*, int64_t);
template void swiglu_backward(const Bfloat16*, const Bfloat16*, const Bfloat16*, Bfloat16*,
                              Bfloat16*, int64_t);

}  // namespace graft::kernels::cpu
