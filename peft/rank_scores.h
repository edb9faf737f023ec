// RankScores: how much the loss needs each rank of an update B diag(E) A, from the gradients of the
// steps so far, and which of the ranks were chosen by it. What AdaLoRA remembers from step to step.
//   Zhang et al. 2023, arXiv:2303.10512, eq. 7 to 10
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string>

#include "peft/method.h"

namespace graft::peft {

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
  /// E = 0 for the others.
  void keep_chosen() const;

 private:
  std::array<Tensor, 3> factors_, importance_, deviation_;
  Tensor chosen_;  ///< [rows, 1]: 1 or 0
};

}  // namespace graft::peft
