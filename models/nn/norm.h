// RmsNorm: y = x / rms(x) * w, computed in float32, cast back before the weight (Llama's order).
#pragma once

#include "kernels/rms_norm/rms_norm.h"
#include "models/slots.h"
#include "models/weight.h"

namespace graft::models {

struct RmsNorm {
  Weight weight;  ///< [D]
  double eps = 1e-5;
  Slot<LinearAdapter> gain;  ///< its adapters' merged() makes the weight that is used
  Slot<TensorAdapter> slot;

  RmsNorm() = default;
  RmsNorm(int64_t width, double epsilon) : weight({width}, WeightUse::kVector), eps(epsilon) {}
  Tensor operator()(const Tensor& x, const Pass& pass) const {
    Tensor w = weight.value();
    if (pass.adapters) {
      for (const auto& adapter : gain.adapters()) w = adapter->merged(w);
    }
    Tensor y = kernels::rms_norm(x, w, eps);
    return slot.empty() ? y : run(slot, std::move(y), pass);
  }
};

}  // namespace graft::models
