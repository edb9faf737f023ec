// SourceWeights: the dense matrices of a base straight from its files, for verbs that never load
// it.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "models/match.h"
#include "peft/method.h"

namespace graft::launcher {

/// Unquantised, or as a 4-bit file's codes say. Holds references to the first two arguments.
class SourceWeights : public peft::BaseWeights {
 public:
  SourceWeights(const std::vector<models::MatchedWeight>& weights, models::io::TensorSource& source,
                int64_t head_dim)
      : weights_(weights), source_(source), head_dim_(head_dim) {}
  at::Tensor weight(const peft::LinearSite& site) override;
  at::Tensor bias(const peft::LinearSite& site) override;
  /// As the file has it, in the order of rows that the model wants.
  at::Tensor read(const models::MatchedWeight& weight);

 private:
  const models::MatchedWeight* find(const std::string& name) const;

  const std::vector<models::MatchedWeight>& weights_;
  models::io::TensorSource& source_;
  int64_t head_dim_;
};

/// A base of which no weight is kept: its files are read where they are asked for.
class UnloadedBase {
 public:
  explicit UnloadedBase(std::string path) : path_(std::move(path)) {}
  std::unique_ptr<models::Model> make_model() const;
  /// Opens the files, for a model of theirs.
  SourceWeights& open(models::Model& model);
  models::io::TensorSource& source() { return *source_; }
  const std::vector<models::MatchedWeight>& matched() const { return matched_; }
  std::string fingerprint() const;

 private:
  std::string path_;
  std::unique_ptr<models::io::TensorSource> source_;
  std::vector<models::MatchedWeight> matched_;
  std::optional<SourceWeights> weights_;
};

}  // namespace graft::launcher
