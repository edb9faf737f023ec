// Checkpoints: adapter, moments, cursor and schedule of a run at a step boundary. A folder appears
// under its name only when it is whole; a kill at any write leaves the previous checkpoint or the
// new one.
#pragma once

#include <optional>
#include <string>

#include "launcher/trainer.h"

namespace graft::launcher {

/// The run's folder, held by one job at a time.
class OutputDirectory {
 public:
  /// Makes the folder and locks it (rank 0).
  /// @throws graft::Error (kUsage) if another job holds it
  OutputDirectory(std::string path, const World& world);
  ~OutputDirectory();
  OutputDirectory(const OutputDirectory&) = delete;
  OutputDirectory& operator=(const OutputDirectory&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  int lock_ = -1;
};

/// Writes checkpoints/step-NNNNNNNN, then removes all but the newest `limit` (and the best).
/// Collective.
/// @throws graft::Error (kData) on every rank if any rank cannot write; earlier checkpoints are
/// untouched
void save_checkpoint(const std::string& output_dir, Workbench& bench, Trainer& trainer,
                     const Run& run);

/// The newest folder under `output_dir` that verifies, or nothing if there is none at all; says
/// which were passed over. Collective: all ranks get rank 0's choice.
/// @throws graft::Error (kNoCheckpoint) if there are checkpoints and none is good
std::optional<std::string> find_checkpoint(const std::string& output_dir, World& world);

/// Takes over adapter, moments, cursor and counters. Written at any world size.
/// @throws graft::Error (kUsage) listing what differs between the checkpoint's config and `run`
void load_checkpoint(const std::string& directory, Workbench& bench, Trainer& trainer,
                     const Run& run);

/// Writes the trained adapters in PEFT's layout into `directory`, whole or not at all. Rank 0.
void save_adapter(const std::string& directory, const Workbench& bench, const Run& run);

}  // namespace graft::launcher
