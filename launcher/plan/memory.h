// Memory of a step by formula, and how many lanes of it may be under way together.
#pragma once

#include <cstdint>

#include "launcher/world.h"
#include "models/model.h"
#include "models/trunk.h"

namespace graft::launcher {

/// Bytes that one lane keeps between its way up and its way down. With recomputation the input of
/// each stage; else about twice the outputs of the frozen matrices (what autograd saves of a
/// pre-norm decoder: measured 1.4 times on the 135M Llama shape, float32).
/// @param tokens  rows times columns of the lane
int64_t lane_bytes(const models::ModelInfo& info, int64_t tokens, models::Recompute recompute,
                   at::ScalarType dtype);

/// Memory of the device that is free for this rank now: on a CPU its share of what the node has
/// left.
int64_t free_memory_bytes(const World& world);

/// Lanes of a step that share one gather of each block: all of them, or as many as fill at most
/// half of what is free on the fullest rank; one at least. Collective.
int64_t lanes_that_fit(const World& world, int64_t lanes, int64_t bytes_of_a_lane);

}  // namespace graft::launcher
