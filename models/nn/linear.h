// Linear and Embedding: a matrix of the base with a slot. The base product saves the weight's
// handle, not the matrix, and asks again in backward, so a dequantised copy never outlives its
// block's pin. The gradient of a thawed matrix goes to the leaf that stands for it.
#pragma once

#include "models/slots.h"
#include "models/weight.h"

namespace graft::models {

/// y = x W^T + b.   x [..., in] -> [..., out]
struct Linear {
  LinearInfo info;
  Weight weight;  ///< [out, in]
  Weight bias;    ///< [out], or undefined
  Slot<LinearAdapter> slot;

  Linear() = default;
  Linear(std::string name, int64_t in, int64_t out, bool has_bias,
         WeightUse use = WeightUse::kMatrix);
  Tensor operator()(const Tensor& x, const Pass& pass) const;
};

/// Rows of a table.   ids [...] int64 -> [..., D]
struct Embedding {
  LinearInfo info;
  Weight weight;  ///< [V, D]
  Slot<LinearAdapter> slot;

  Embedding() = default;
  Embedding(std::string name, int64_t rows, int64_t width);
  Tensor operator()(const Tensor& ids, const Pass& pass) const;
};

/// x W^T + b: W is rebuilt in backward; gradients to x and to what is trained. `bias` may be
/// undefined.
Tensor base_linear(const Tensor& x, const Weight& weight, const Weight& bias);

/// The matrix of a Linear as adapters see it; also used for a head that shares the embedding's
/// table.
class BaseLinearOp : public LinearOp {
 public:
  BaseLinearOp(const Weight& weight, const Weight& bias) : weight_(weight), bias_(bias) {}
  Tensor operator()(const Tensor& x) const override { return base_linear(x, weight_, bias_); }
  Tensor weight() const override { return weight_.dense_to_keep(); }

 private:
  const Weight& weight_;
  const Weight& bias_;
};

}  // namespace graft::models
