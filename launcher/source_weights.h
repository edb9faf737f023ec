// SourceWeights: the dense matrices of a base straight from its files, for verbs that never load
// it.
#pragma once

#include <vector>

#include "models/match.h"
#include "peft/method.h"

namespace graft::launcher {

/// Embedding and head as the model's file has them: what PEFT keeps copies of. Holds references to
/// both arguments.
class SourceWeights : public peft::BaseWeights {
 public:
  SourceWeights(const std::vector<models::MatchedWeight>& weights, models::io::TensorSource& source)
      : weights_(weights), source_(source) {}
  at::Tensor weight(const peft::LinearSite& site) override;
  at::Tensor bias(const peft::LinearSite& site) override;  ///< a bug: neither has one

 private:
  const std::vector<models::MatchedWeight>& weights_;
  models::io::TensorSource& source_;
};

}  // namespace graft::launcher
