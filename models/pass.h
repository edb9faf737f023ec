// What travels through a model: the Carry from stage to stage, the Sequence that says how tokens
// relate, and the Pass that says where a call is. Shape letters: B rows, L positions, T tokens, D
// width, H heads, K head width, V vocabulary.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "data/batch.h"
#include "kernels/random/random.h"

namespace graft::models {

using at::Tensor;

/// One document inside a row: positions [begin, end). It never sees another one.
struct Document {
  int64_t row, begin, end;
};

/// How the positions of a lane relate. Immutable once made; adapters that add positions make a new
/// one.
struct Sequence {
  std::vector<Document> documents;  ///< in row order; a position outside all of them is padding
  bool whole_rows = false;          ///< every row is one document from end to end
  Tensor positions_BL;              ///< int64, of each position in its document
  /// Where the batch's tokens [B, T] stand after adapters have put rows between them; undefined:
  /// where they stood.
  Tensor token_places_BT;
  Tensor cos_BLK, sin_BLK;  ///< float32 rotary tables; undefined where a model has none
};

/// The state between two stages: h_BLD first, then what a family adds.
struct Carry {
  std::vector<Tensor> tensors;
  std::shared_ptr<const Sequence> sequence;

  const Tensor& h() const { return tensors.front(); }
  Carry with(Tensor h) const {
    Carry out = *this;
    out.tensors.front() = std::move(h);
    return out;
  }
};

/// Keys and values of the positions seen so far, one entry a layer; [B, heads, positions, K].
struct KvCache {
  struct Layer {
    Tensor k, v;
  };
  std::vector<Layer> layers;
  int64_t length = 0;             ///< positions held; a pass appends behind them
  std::shared_ptr<KvCache> look;  ///< of the looks of the passes that append here
};

/// What the last stage returns as h(): the summed loss (scalar), that and the number of targets
/// whose logit is the largest [2] float64, all logits [B, T, V], those of the last position, or
/// the last hidden state [B, T, D], after the final norm.
enum class Want { kLoss, kLossAndHits, kLogits, kLastLogits, kHidden };

/// Where a call is: everything a stage or an adapter may depend on besides its input.
struct Pass {
  const data::Batch* batch = nullptr;
  int64_t lane = 0;  ///< number of the micro-batch in the step, over all ranks
  int stage = 0;
  bool training = false;
  bool adapters = true;  ///< false: the untouched base
  Want want = Want::kLoss;
  kernels::Key random{};       ///< of (seed, step, lane); slots derive theirs from it
  kernels::Key step_random{};  ///< of (seed, step) alone: for what all lanes and ranks share
  KvCache* cache = nullptr;
  /// What the untouched base makes of the batch's tokens, without gradients: Want::kHidden.
  /// Undefined unless an adapter looks().
  Tensor look_BTD = {};
  /// At attention and MLP: the residual stream, of which the sublayer's input is the norm.
  Tensor residual_BLD = {};

  Pass beside(const Tensor& residual) const {
    Pass out = *this;
    out.residual_BLD = residual;
    return out;
  }
};

/// One micro-batch on its way. The batch is immutable during a sweep; the sums are its result.
struct Lane {
  data::Batch batch;
  int64_t number = 0;  ///< in the step, over all ranks
  double loss_sum = 0;
};

}  // namespace graft::models
