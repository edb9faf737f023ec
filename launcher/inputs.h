// What a run reads, in short: the same when it goes on, and the same on all ranks, or the numbers
// would be of no run at all.
#pragma once

#include <nlohmann/json.hpp>

#include "data/loader.h"
#include "launcher/run.h"
#include "launcher/world.h"

namespace graft::launcher {

/// The rows trained on (how many, how long, by which tokenizer, samples of their bytes) and the
/// frozen adapters. What else a run reads has a fingerprint of its own or only sets it off.
nlohmann::json input_facts(const Run& run, const data::Corpus& train);

/// Looks at the configuration, the shards, the base's files and the adapters as each rank sees
/// them. Collective. @throws graft::Error (kData; kUsage for the configuration) naming what differs
/// and the first rank whose view is another than rank 0's
void check_same_inputs(const World& world, const Run& run, const data::Corpus& train);

}  // namespace graft::launcher
