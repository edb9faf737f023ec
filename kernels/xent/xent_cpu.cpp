#include <algorithm>
#include <cmath>

#include "kernels/lanes.h"

namespace graft::kernels::cpu {
namespace {

/// log sum e^(logit - largest). Summed in blocks, so that the error does not grow with the
/// vocabulary.
template <class T>
float log_sum_exp(const T* logits, float largest, int64_t vocabulary) {
  constexpr int64_t kBlock = 1024;
  Lanes total{};
  for (int64_t first = 0; first < vocabulary; first += kBlock) {
    Lanes block{};
    for_lanes(std::min(kBlock, vocabulary - first), [&](int64_t i, auto count) {
      block += exp(load(logits + first + i, count, -__builtin_inff()) - largest);
    });
    total += block;
  }
  return std::log(sum(total));
}

template <class T>
float largest_of(const T* logits, int64_t vocabulary) {
  Lanes most = splat(-__builtin_inff());
  for_lanes(vocabulary, [&](int64_t i, auto count) {
    const Lanes logit = load(logits + i, count, -__builtin_inff());
    most = logit > most ? logit : most;
  });
  return largest(most);
}

}  // namespace

template <class T>
void softmax_loss(const T* logits, const int64_t* labels, int64_t ignored, float* losses,
                  T* d_logits, int64_t rows, int64_t vocabulary) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* in = logits + row * vocabulary;
    T* out = d_logits == nullptr ? nullptr : d_logits + row * vocabulary;
    const int64_t label = labels[row];
    losses[row] = 0;
    if (label == ignored) {
      if (out != nullptr) std::fill_n(out, vocabulary, T{});
      continue;
    }
    const float most = largest_of(in, vocabulary);
    const float log_sum = log_sum_exp(in, most, vocabulary);
    const float shifted_target = load(in + label, 1)[0] - most;
    losses[row] = log_sum - shifted_target;
    if (out == nullptr) continue;
    for_lanes(vocabulary, [=](int64_t i, auto count) {
      store(out + i, exp(load(in + i, count) - most - log_sum), count);
    });
    store(out + label, splat(std::exp(shifted_target - log_sum) - 1.0F), 1);
  }
}

template void softmax_loss(const float*, const int64_t*, int64_t, float*, float*, int64_t, int64_t);
template void softmax_loss(const Bfloat16*, const int64_t*, int64_t, float*, Bfloat16*, int64_t,
                           int64_t);

}  // namespace graft::kernels::cpu
