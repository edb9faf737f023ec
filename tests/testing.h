// What tests of several folders share: golden files and their rules, batches, weights that live in
// memory, and a loaded base with its trunk.
#pragma once

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "data/batch.h"
#include "dist/block_store.h"
#include "dist/comm.h"
#include "models/io/source.h"
#include "models/load.h"
#include "models/model.h"
#include "models/trunk.h"
#include "peft/peft.h"

namespace graft::testing {

using at::Tensor;

/// tests/golden/`name`.
nlohmann::json golden(const std::string& name);

/// Numbers in [-scale, scale) from a linear congruential generator seeded with the FNV-1a hash of
/// the name: how the goldens and tests/oracle/make_fixtures.py generate weights. float32,
/// row-major.
Tensor fill(std::string_view name, at::IntArrayRef shape, double scale);
/// The weight that the goldens give a base tensor of this Hugging Face name.
Tensor golden_weight(std::string_view hf_name, at::IntArrayRef shape);

/// The largest |actual - expected| over the largest |expected|: infinite if the shapes differ.
double relative_error(const Tensor& actual, const Tensor& expected);

/// Rows of one document each. Labels are the tokens themselves where they are targets, -100
/// elsewhere: not shifted, as transformers takes them.
/// @param tokens_BL, labels_BL  int64
data::Batch batch_of(const Tensor& tokens_BL, const Tensor& labels_BL);
/// The same where every token but the first is a target.
data::Batch batch_of(const Tensor& tokens_BL);
/// Tokens of a vocabulary, a pure function of the seed.
Tensor random_tokens(int64_t rows, int64_t length, int64_t vocab_size, uint64_t seed);

/// A TensorSource whose tensors a test made.
class MemorySource : public models::io::TensorSource {
 public:
  explicit MemorySource(std::map<std::string, Tensor> values);
  const std::vector<models::io::SourceTensor>& tensors() const override { return tensors_; }
  Tensor read(const std::string& name) override { return values_.at(name); }
  std::string describe() const override { return "memory"; }

 private:
  std::map<std::string, Tensor> values_;
  std::vector<models::io::SourceTensor> tensors_;
};

/// What the goldens' rules give a model, under Hugging Face's names.
std::map<std::string, Tensor> golden_weights(models::Model& model);

/// A small Llama: `layers` blocks, 48 wide, grouped queries, 128 tokens.
nlohmann::json tiny_llama(int layers = 2, bool tied_head = false);

/// float32 and dense: what comparisons with a reference start from.
models::LoadOptions unquantised();

/// A model with its weights in a store, ready for its trunk.
struct Base {
  std::unique_ptr<models::Model> model;
  std::unique_ptr<dist::BlockStore> store;
  std::unique_ptr<models::Trunk> trunk;
  std::vector<models::SourceHash> hashes;

  /// Collective over `comm`.
  Base(const nlohmann::json& config, models::io::TensorSource& source, dist::Comm& comm,
       const models::LoadOptions& options = unquantised());
  /// With weights by the goldens' rules.
  Base(const nlohmann::json& config, dist::Comm& comm,
       const models::LoadOptions& options = unquantised());

  /// All logits of one batch, [B, L, V].
  Tensor logits(const data::Batch& batch) const;
  /// Summed loss of one batch over its targets, divided by their number.
  double mean_loss(const data::Batch& batch) const;
  models::Weight& weight(const std::string& name) const;

 private:
  void load(models::io::TensorSource& source, dist::Comm& comm, const models::LoadOptions& options);
};

/// A method with the fields of `config`, on the model, trained; values that are not zero take the
/// place of the initial ones, so that every gradient has something to be.
/// @param config  the method's fields: r, target_modules ...
std::unique_ptr<peft::Peft> attach(models::Model& model, const std::string& method,
                                   const nlohmann::json& config);

}  // namespace graft::testing
