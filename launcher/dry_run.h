// What can be known of a run before any weight is read: mistakes (graft validate), and what it
// would do (graft train --dry-run).
#pragma once

#include <string>

#include "launcher/run.h"
#include "launcher/world.h"

namespace graft::launcher {

/// Opens the shards, reads the model's shape, matches targets with slots.
/// @throws graft::Error naming what is wrong
void check_files(Run& run);

/// What is trained, on what, for how many steps; then the first documents of the first step,
/// decoded, with the tokens that are targets in [[ ]].
std::string dry_run(Run& run, const World& world);

}  // namespace graft::launcher
