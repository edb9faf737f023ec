// Frozen LoRAs mixed token by token: y = W x + sum_n s_n (alpha_n / r_n) B_n A_n x, for methods
// that train what gives the scalings s (Method::experts). Those ride in the carry, so that their
// gradients come down with it; what makes them stands at `input`.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "peft/method.h"

namespace graft::peft {

/// Where a lane's scalings are: [B, T, M, N] float32 of M matrices, or 1 for all, and N LoRAs.
class Mixture {
 public:
  models::Carry add_scalings(models::Carry carry, Tensor s_BTMN);
  /// Runs a block that takes them from its input.
  models::Carry run(models::Carry carry, const models::CarryAdapter::Stage& stage);
  /// Of one matrix in the block that runs, [B, T, N].
  Tensor scalings(int64_t matrix) const;

 private:
  size_t place_ = 0;  ///< in the carry
  Tensor now_BTMN_;
};

/// Puts the LoRAs of context.experts on their matrices, which are numbered in the order of slots.
/// @param names  of the LoRAs, for messages
/// @return how many matrices there are
/// @throws graft::Error for what is no LoRA of matrices in the blocks
int64_t attach_mixture(AttachContext& context, const std::vector<std::string>& names,
                       const std::shared_ptr<Mixture>& mixture);

}  // namespace graft::peft
