// SlotMap: every slot of a model with its name, role and stage, as methods see it.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "models/model.h"
#include "models/names.h"

namespace graft::peft {

using at::Tensor;

/// One slot: where it is and the slot itself.
template <class A>
struct Site {
  std::string name;  ///< "block.3.attn.q"
  std::string role;  ///< "attn.q"
  int stage = 0;
  models::Slot<A>* slot = nullptr;
};

struct LinearSite : Site<models::LinearAdapter> {
  models::LinearInfo info;
  int layer = -1;       ///< -1 outside of the blocks
  std::string hf_path;  ///< "model.layers.3.self_attn.q_proj"
};

/// A tensor of the base, for methods that thaw it.
struct WeightSite {
  std::string name;               ///< "block.3.attn.q.weight"
  std::string hf_name;            ///< "model.layers.3.self_attn.q_proj.weight"
  int layer = -1;                 ///< -1 outside of the blocks
  int stage = 0, last_stage = 0;  ///< the stages that use it: a tied table has two
  models::Weight* weight = nullptr;
};

struct SlotMap {
  explicit SlotMap(models::Model& model);

  std::vector<LinearSite> linears;
  std::vector<LinearSite> gains;  ///< vectors of norms: "block.3.attn_norm"
  std::vector<Site<models::SublayerAdapter>> sublayers;
  std::vector<Site<models::AttentionAdapter>> attentions;
  std::vector<Site<models::SequenceAdapter>> sequences;
  std::vector<Site<models::TensorAdapter>> tensors;
  std::vector<Site<models::CarryAdapter>> carries;
  std::vector<Site<models::LossAdapter>> losses;
  std::vector<WeightSite> weights;
  const models::NameMap* names = nullptr;

  const LinearSite* find_linear(const std::string& name) const;
  /// The place before the first block; null for a model without.
  const Site<models::SequenceAdapter>* find_input() const;

  /// f(site) for every slot of every kind.
  template <class F>
  void each(F f) const {
    each_of(f, linears, gains);
    each_beside_matrices(f);
  }
  /// The kinds whose adapters do more than to change a matrix or the vector of a norm.
  template <class F>
  void each_beside_matrices(F f) const {
    each_of(f, sublayers, attentions, sequences, tensors, carries, losses);
  }

 private:
  template <class F, class... Lists>
  static void each_of(F f, const Lists&... lists) {
    (std::for_each(lists.begin(), lists.end(), f), ...);
  }
};

}  // namespace graft::peft
