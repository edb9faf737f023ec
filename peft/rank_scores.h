// Which ranks of updates B diag(E) A the loss needs, or which updates as a whole. RankScores: what
// AdaLoRA remembers of an update from step to step, and the choice that was made by it.
//   Zhang et al. 2023, arXiv:2303.10512, eq. 7 to 10
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string>
#include <vector>

#include "peft/method.h"

namespace graft::peft {

/// Smooths a score with beta1, and its distance from that with beta2.
struct SmoothScore {
  Tensor importance, deviation;
};
void smooth_score(const Tensor& score, const SmoothScore& smooth, double beta1, double beta2);

class RankScores {
 public:
  /// @param factors  A [rows, in], B [out, rows] and E [rows, 1]
  explicit RankScores(std::array<Tensor, 3> factors);
  /// Lists what the next steps need as constants, under names that PEFT ignores.
  void list(AttachContext& context, const LinearSite& site) const;
  /// Smooths |w dL/dw| of every element with beta1, and its distance from that with beta2.
  void update(double beta1, double beta2) const;
  /// [rows]: of E, and on average of the row of A and the column of B.
  Tensor of_rows() const;
  /// Those above the threshold.
  void choose(const Tensor& threshold) const;
  /// The `target` rows of highest score over all slots, and a share of the rest.
  static void choose_best(const std::vector<const RankScores*>& slots, int64_t target,
                          double share);
  /// E = 0 for the others.
  void keep_chosen() const;

 private:
  std::array<Tensor, 3> factors_, importance_, deviation_;
  Tensor chosen_;  ///< [rows, 1]: 1 or 0
};

/// y. On the way down, what the loss needs of the update D = B A as a whole, |D o dL/dD| summed
/// over its elements, over the square root of their number, becomes the gradient of `score` [1], so
/// that it is summed over lanes and ranks as gradients are; kScoreShrink times, to be no part of
/// their norm. No value depends on `score`.
/// @param y  [..., out] what the update of x [..., in] was added to
Tensor scored(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
              const Tensor& score);
inline constexpr double kScoreShrink = 0x1p-40;

/// Adds to the gradients of A and B what weight (|A A^T - I| + |B^T B - I|), Frobenius norms, has:
/// the first `count` rows of A and columns of B are to be orthogonal.
void add_orthogonality(const Tensor& a, const Tensor& b, int64_t count, double weight);

}  // namespace graft::peft
