#include "kernels/adamw/adamw_step.h"
#include "kernels/lanes.h"

namespace graft::kernels::cpu {

void adamw(const AdamWPiece& piece, const AdamWStep& step) {
  for_lanes(piece.size, [=](int64_t i, auto count) {
    const Lanes g = load(piece.gradient + i, count);
    const Lanes m_old = load(piece.first_moment + i, count);
    const Lanes m = m_old + (g - m_old) * step.one_minus_beta1;
    const Lanes v =
        load(piece.second_moment + i, count) * step.beta2 + g * g * step.one_minus_beta2;
    const Lanes denominator = sqrt(v) / step.sqrt_correction + step.epsilon;
    const Lanes p = load(piece.parameter + i, count) * step.decay;
    store(piece.first_moment + i, m, count);
    store(piece.second_moment + i, v, count);
    store(piece.parameter + i, p - step.step_size * m / denominator, count);
  });
}

double sum_of_squares(const float* values, int64_t size) {
  using Floats = float __attribute__((vector_size(32)));
  using Doubles = double __attribute__((vector_size(64)));
  Doubles low{}, high{};  // two names: GCC keeps one vector of sixteen doubles in memory
  for_lanes(size, [&](int64_t i, auto count) {
    const Lanes lanes = load(values + i, count);
    Floats halves[2];
    std::memcpy(halves, &lanes, sizeof(lanes));
    const Doubles first = __builtin_convertvector(halves[0], Doubles);
    const Doubles second = __builtin_convertvector(halves[1], Doubles);
    low += first * first;
    high += second * second;
  });
  const Doubles squares = low + high;
  double total = 0;
  for (int i = 0; i < kLanes / 2; ++i) total += squares[i];
  return total;
}

}  // namespace graft::kernels::cpu
