// How a Batch becomes a Sequence: where its documents begin and end; and how rows that are no
// tokens come to stand in it.
#pragma once

#include "models/pass.h"

namespace graft::models {

/// Documents are runs of equal numbers in documents_BL; -1 is padding.
Sequence make_sequence(const data::Batch& batch);

/// Puts the same rows, soft tokens, in front of every document: they take the first positions, and
/// the document's own count on from there.
/// @param rows_PD  in any floating dtype; differentiable
Carry put_before_documents(const Carry& carry, const Tensor& rows_PD);

/// Moves all positions by a count, as if so many rows stood in front: what a key/value cache or a
/// prefix of keys holds.
Carry shift_positions(const Carry& carry, int64_t count);

/// The hidden states [B, T, D] of the batch's own tokens.
Tensor at_tokens(const Carry& carry);

}  // namespace graft::models
