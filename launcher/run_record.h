// What a run says of itself: run.json for machines, the banner for people.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "launcher/trainer.h"
#include "launcher/workbench.h"

namespace graft::launcher {

/// Versions, command, hosts, topology, seeds, fingerprint. Collective.
nlohmann::ordered_json run_record(const Workbench& bench, const Run& run);
/// A few lines: base, what is trained, what a step is, where it runs.
std::string banner(const Workbench& bench, Trainer& trainer, const Run& run);

/// Makes the folder. @throws std::filesystem::filesystem_error
std::string log_file(const std::string& output_dir, int rank);

}  // namespace graft::launcher
