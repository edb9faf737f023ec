// The state of the optimiser, and what methods keep, in a checkpoint: each rank writes an equal
// share of the replicated elements, and what it owns of a thawed weight; any number of ranks reads
// what it needs.
#pragma once

#include <string>

#include "launcher/optim/step_rule.h"
#include "peft/param_set.h"

namespace graft::launcher {

/// Writes state-RANK-of-WORLD.safetensors: what stands for elements [begin, end) of all parameters
/// in one row, as pieces of the state's tensors. Key: exp_avg/NAME/BEGIN, BEGIN the piece's
/// first element in its tensor.
void save_moments(const std::string& directory, int rank, int world, const peft::ParamSet& params,
                  const StepRule& optimizer);

/// Fills the state from the pieces of all ranks of the saving run.
/// @throws graft::Error (kData) if pieces are missing
void load_moments(const std::string& directory, int world, const peft::ParamSet& params,
                  const StepRule& optimizer);

}  // namespace graft::launcher
