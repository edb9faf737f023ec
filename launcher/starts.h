// First values that come from the base's matrices or from rows of the data (Method::start). Every
// rank sees the same rows, each watches the slots it will compute, and what one has computed the
// others get: so all start from the same bits, whatever the number of ranks, and no rank holds the
// statistics of more than its share of the slots.
#pragma once

#include <functional>
#include <vector>

#include "dist/comm.h"
#include "models/load.h"
#include "models/trunk.h"
#include "peft/peft.h"

namespace graft::launcher {

struct StartInputs {
  models::Model& model;
  peft::Peft& adapters;
  dist::Comm& host;  ///< all ranks, CPU tensors
  models::io::TensorSource& source;
  const models::LoadOptions& options;
  at::Device device;
  /// The base as its file has it, loaded; called at most once, if a method wants to see rows.
  std::function<models::Trunk&()> load_base;
  /// Micro-batches that hold the first so many rows of the run, the same on every rank.
  std::function<std::vector<models::Lane>(const peft::Calibration& wanted)> rows;
};

/// Sets the first values of Peft::starts(). Collective.
void set_starts(const StartInputs& inputs);

}  // namespace graft::launcher
