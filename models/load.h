// Loading a base: which tensors a model needs, who reads which, how they become bytes in the
// BlockStore. Ranks share the tensors out; a tensor is read and quantised whole by one rank, which
// sends the shards, so host memory holds the store and, on each rank, one tensor (dense and
// encoded) at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "dist/block_store.h"
#include "models/io/source.h"
#include "models/match.h"
#include "models/model.h"

namespace graft::models {

enum class Quantization { kNone, kNf4, kFp4, kInt8 };

struct LoadOptions {
  Quantization quantization = Quantization::kNf4;
  bool double_quantization = true;
  at::ScalarType compute_dtype = at::ScalarType::Float;
  /// Shown every matrix before it is quantised; may return what to store instead.
  std::function<Tensor(const std::string& name, Tensor dense)> prepare_weight;
  std::function<void(int64_t done, int64_t total)> progress;  ///< bytes of the source
};

/// A tensor's name and the XXH3-128 of its source bytes, for the base's fingerprint.
struct SourceHash {
  std::string name, hash;
};

/// Lays the model's weights out in the store, reads them and checks that source and model agree.
/// Collective over the store's ranks.
/// @return the hashes of the tensors this rank read
/// A matrix that the file holds in four bits keeps its codes bit for bit.
/// @throws graft::Error (kData) as match_weights; (kUsage) if the file holds a matrix in four bits
/// of another type or nesting than the options ask for
std::vector<SourceHash> load_weights(Model& model, dist::BlockStore& store,
                                     io::TensorSource& source, const LoadOptions& options);

/// Whether a source holds matrices in four bits: those keep their codes, nothing can prepare them.
bool holds_four_bit(const io::TensorSource& source);

/// A matrix as prepare_weight is shown it.
/// @throws graft::Error (kUsage) if the source holds it in four bits
Tensor read_matrix(const MatchedWeight& item, io::TensorSource& source, int64_t head_dim);

/// What the model computes with once `w` is stored in the place of a matrix; on the CPU.
Tensor stored(const MatchedWeight& item, const Tensor& w, const LoadOptions& options);

/// One hash for a base, whatever the world size or quantiser: over all tensors in the order of
/// their names.
std::string fingerprint(std::vector<SourceHash> hashes);
/// The same for a base that is not loaded: reads every tensor once.
std::string fingerprint(io::TensorSource& source, const std::vector<MatchedWeight>& weights);

}  // namespace graft::models
