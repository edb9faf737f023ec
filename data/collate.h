// Documents to tensors: tokens, positions, document numbers and shifted labels of one lane.
// Shape letters: B rows of a lane, L columns.
#pragma once

#include <cstdint>
#include <span>

#include "data/batch.h"

namespace graft::data {

/// The label of a position that predicts nothing.
inline constexpr int64_t kNoLabel = -100;

/// A document and its place in a lane; documents of a row do not overlap and come in the order of
/// their columns.
struct Piece {
  std::span<const uint32_t> tokens;
  std::span<const uint8_t> loss_mask;  ///< one a token; 1: this token is a target
  int64_t row = 0;
  int64_t column = 0;
  int64_t label = kNoLabel;  ///< of the document, to be predicted at its last token
  std::span<const uint32_t> token_labels = {};  ///< one a token, to be predicted at the targets
};

/// Lays documents into a batch of [rows, columns]. Position t is labelled with token t+1 of its own
/// document if that token is a target, else with kNoLabel, so a document's first token is never
/// predicted. A piece with a label, or with those of its tokens, has these instead. What no
/// document covers is padding: token 0, position 0, document -1, no label.
/// @return tensors on the CPU
Batch collate(std::span<const Piece> pieces, int64_t rows, int64_t columns);

}  // namespace graft::data
