// LayerLoss: terms of the loss that are known inside a block only. No graph crosses a stage, so
// their sum rides in the carry from block to block, and the loss slot adds it.
#pragma once

#include <memory>

#include "peft/method.h"

namespace graft::peft {

class LayerLoss {
 public:
  /// Puts what carries the sum around every block and at the loss.
  /// @param weight  the sum is added that many times; 0: no terms are wanted
  static std::shared_ptr<LayerLoss> attach(AttachContext& context, double weight);

  bool is_wanted(const models::Pass& pass) const { return pass.training && weight_ > 0; }
  /// Of the block under way, a scalar summed over its lane, if it is wanted.
  void add(const Tensor& term) { term_ = term_.defined() ? term_ + term : term; }

 private:
  class Around;
  class AtLoss;
  explicit LayerLoss(double weight) : weight_(weight) {}

  double weight_;
  Tensor term_;       ///< of the block under way
  size_t place_ = 0;  ///< in the carry
};

}  // namespace graft::peft
