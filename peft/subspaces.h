// AdaMSS's subspaces: clusters of the outputs of a matrix by its singular vectors, and what it
// remembers of them from step to step to stop those that the loss needs least (adaptive subspace
// allocation). NeurIPS 2025; HF PEFT 0.21.2, tuners/adamss
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "peft/method.h"
#include "peft/places.h"

namespace graft::peft {

/// The first r singular vectors of w [out, width], [out, r] and [r, width], as torch.svd_lowrank
/// has them with this seed.
std::pair<Tensor, Tensor> singular_vectors(const Tensor& w, int64_t r, int seed);

/// The cluster of each row, int64: Lloyd's iteration from rows drawn at random.
Tensor clusters_of(const Tensor& rows, int64_t count, int seed);

class SubspaceScores {
 public:
  /// @param a  [count rank, r], the subspaces one after the other
  /// @param b  [out, rank]
  /// @param subspaces  [out], the number of each output's, below `count`; of `slot`
  SubspaceScores(Tensor a, Tensor b, const Tensor& subspaces, int64_t count,
                 const std::string& slot);
  /// [out, count]: 1 where the output is in the subspace.
  Tensor members() const;
  /// Lists what the next steps need as constants, under names that PEFT ignores.
  void list(AttachContext& context, const LinearSite& site) const;
  /// Smooths |w dL/dw| of every element with beta1, and its distance from what it was with beta2.
  void update(double beta1, double beta2) const;
  /// Those of highest score over all slots go on, the others rest for good; all scores begin anew.
  /// As in PEFT it is those above the `target`th: one less.
  static void keep_best(const std::vector<SubspaceScores*>& slots, int64_t target);
  /// Before the optimiser's step, and after it: what rests does not move.
  void hold();
  void restore() const;

 private:
  Tensor of_subspaces() const;  ///< [count]: on average over A, and over B
  Tensor moves(size_t i) const;

  int64_t count_;
  Places subspaces_;
  Tensor active_;  ///< [count]: 1 or 0
  std::array<Tensor, 2> factors_, importance_, deviation_, held_;
};

}  // namespace graft::peft
