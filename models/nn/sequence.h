// How a Batch becomes a Sequence: where its documents begin and end.
#pragma once

#include "models/pass.h"

namespace graft::models {

/// Documents are runs of equal numbers in documents_BL; -1 is padding.
Sequence make_sequence(const data::Batch& batch);

}  // namespace graft::models
