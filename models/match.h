// Which tensor of a source fills which weight of a model: for loading a base and for writing a
// merged one.
#pragma once

#include <string>
#include <vector>

#include "models/io/source.h"
#include "models/model.h"
#include "models/names.h"

namespace graft::models {

/// Hugging Face's names of the two tables that may be one.
inline constexpr const char* kEmbeddingTensor = "model.embed_tokens.weight";
inline constexpr const char* kHeadTensor = "lm_head.weight";

/// One weight of a model and where it comes from.
struct MatchedWeight {
  std::string name;  ///< ours, "block.3.attn.q.weight"
  Weight* weight = nullptr;
  int block = 0;
  const io::SourceTensor* source = nullptr;
  Transform transform = Transform::kIdentity;  ///< what the source's rows still need
};

/// The model's weights in its order, each with its tensor; both sides must be used up. The copy of
/// the head beside a tied table counts as used.
/// @throws graft::Error (kData) with four lists: weights not filled, tensors not known, shapes that
/// differ, types that are not floating point
std::vector<MatchedWeight> match_weights(Model& model, const io::TensorSource& source);

/// Rows of q or k (or their bias) from llama.cpp's order, where neighbours are rotated together, to
/// Hugging Face's, where halves are: [heads, head_dim/2, 2] becomes [heads, 2, head_dim/2]. And
/// back.
Tensor rope_rows_from_gguf(const Tensor& rows, int64_t head_dim);
Tensor rope_rows_to_gguf(const Tensor& rows, int64_t head_dim);

}  // namespace graft::models
