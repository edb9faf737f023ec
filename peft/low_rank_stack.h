// Neighbours of a slot that are all low-rank products, run as one: y = base(x) + B (A x) with their
// factors side by side. A stack of K adapters then costs what one of their summed rank costs.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "models/slots.h"

namespace graft::peft {

using at::Tensor;

/// A frozen adapter of a slot, and how much of what it adds counts.
struct Weighted {
  std::shared_ptr<models::LinearAdapter> adapter;
  double weight = 1;
};

/// Frozen low-rank products as one. Their factors are put side by side at the first use, once for a
/// dtype; they must not change afterwards.
class LowRankStack : public models::LinearAdapter {
 public:
  explicit LowRankStack(std::vector<Weighted> parts) : parts_(std::move(parts)) {
    for (size_t i = 0; i < parts_.size(); ++i)
      register_module(std::to_string(i), parts_[i].adapter);  // to(dtype) reaches them
  }
  Tensor forward(const Tensor& x, const models::LinearOp& base, const models::Pass& pass) override;
  bool mergeable() const override { return true; }
  Tensor merged(const Tensor& w) const override;

 private:
  std::vector<Weighted> parts_;
  Tensor a_, b_;  ///< [sum r, in], [out, sum r]: scales and weights are in B
};

/// What a slot runs instead of these: rows of two and more low-rank products as one, and every
/// product with a weight as a stack of its own. The order stays.
/// @throws graft::Error for a weight other than 1 of what is no low-rank product
std::vector<std::shared_ptr<models::LinearAdapter>> fuse(const std::vector<Weighted>& adapters);

}  // namespace graft::peft
