// The optimiser's moments in a checkpoint: each rank writes an equal share of the elements, and any
// number of ranks reads all shares.
#pragma once

#include <string>

#include "launcher/optim/adamw.h"
#include "peft/param_set.h"

namespace graft::launcher {

/// Writes state-RANK-of-WORLD.safetensors: elements [begin, end) of all parameters in one row, as
/// pieces of parameters. Key: exp_avg/NAME/BEGIN, BEGIN the piece's first element in its parameter.
void save_moments(const std::string& directory, int rank, int world, const peft::ParamSet& params,
                  AdamW& optimizer);

/// Fills the moments from the pieces of all ranks of the saving run.
/// @throws graft::Error (kData) if pieces are missing
void load_moments(const std::string& directory, int world, const peft::ParamSet& params,
                  AdamW& optimizer);

}  // namespace graft::launcher
