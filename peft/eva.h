// What EVA needs: the principal directions of what passes a slot, batch by batch, and who gets how
// many ranks of them.  Paischer et al. 2024, arXiv:2410.07170
// HF PEFT stops a slot when the directions that it would get by now stand still, goes on when it
// would get more of them, and goes round the data until all slots have stopped. Here a slot stops
// when all its candidates stand still, which is later, and each row is seen once: who gets what is
// known only when all ranks have seen theirs.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace graft::peft {

using at::Tensor;

/// Incremental PCA (Ross et al. 2008, as scikit-learn and HF PEFT compute it).
class IncrementalPca {
 public:
  /// @param tau  a batch that turns no direction by more than this cosine ends the fit
  IncrementalPca(int64_t components, double tau) : count_(components), tau_(tau) {}

  /// Takes in rows [n, in], unless the directions stand still or there are fewer than components.
  void fit(Tensor x);
  bool fitted() const { return components_.defined(); }
  const Tensor& components() const { return components_; }            ///< [k, in], orthonormal rows
  const Tensor& singular_values() const { return singular_values_; }  ///< [k]
  Tensor explained_variance_ratio() const;                            ///< [k]

 private:
  int64_t count_;
  double tau_;
  int64_t seen_ = 0;        ///< rows
  Tensor mean_, variance_;  ///< [in] float64; the sum of squared distances to the mean
  Tensor components_, singular_values_;
  bool stands_still_ = false;
};

/// Ranks of slots: of all directions of all slots the `budget` ones that explain the most of their
/// slot's variance. Of equal ones the earlier slot's.
/// @param ratios  of each slot, in falling order
std::vector<int> share_ranks(const std::vector<Tensor>& ratios, int64_t budget);

}  // namespace graft::peft
