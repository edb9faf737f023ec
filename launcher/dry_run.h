// What can be known of a run before any weight is read: mistakes (graft validate), and what it
// would do (graft train --dry-run).
#pragma once

#include <string>
#include <vector>

#include "launcher/run.h"
#include "launcher/world.h"

namespace graft::launcher {

/// As load_run, and opens what the run names: the shards, the model's header, adapters; matches
/// targets with slots.
/// @throws graft::Error (kUsage) with every mistake of file and files, each at its key
Run load_checked_run(const std::string& path, const std::vector<std::string>& overrides);

/// What is trained, on what, for how many steps; then the first documents of the first step,
/// decoded, with the tokens that are targets in [[ ]].
std::string dry_run(Run& run, const World& world);

}  // namespace graft::launcher
