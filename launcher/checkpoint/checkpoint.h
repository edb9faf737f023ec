// Checkpoints: adapter, moments, cursor and schedule of a run at a step boundary. A folder appears
// under its name only when it is whole; a kill at any write leaves the previous checkpoint or the
// new one.
#pragma once

#include <optional>
#include <string>

#include "launcher/checkpoint/folder.h"
#include "launcher/trainer.h"

namespace graft::launcher {

/// Where to go on, after --resume: "auto", "never" or a checkpoint's path; nothing: from the start.
/// A path whose folder holds newer checkpoints is refused: two histories in one folder cannot be
/// told apart later. Collective.
/// @throws graft::Error (kUsage) also for a folder that another run has left without checkpoints
std::optional<std::string> checkpoint_to_resume(const std::string& resume, OutputDirectory& output,
                                                World& world, const Run& run);

/// Checks, before any weight is read, that `run` continues the run that wrote `directory`. A step
/// keeps its lanes: on another rank count `run` gets another accumulation, and says so.
/// @throws graft::Error (kUsage) listing what differs between the checkpoint's config and `run`,
/// if the ranks do not divide the lanes, or if the run has become shorter; (kData) if the rows are
/// others
void prepare_resume(const std::string& directory, const World& world, Run& run);

/// Takes over adapter, moments, cursor and counters. Written at any world size. Collective.
/// @throws graft::Error (kData) on another base
void load_checkpoint(const std::string& directory, const OutputDirectory& output, Workbench& bench,
                     Trainer& trainer);

/// Writes checkpoints/step-NNNNNNNN, then removes those beyond checkpoint.save_total_limit.
/// Collective.
/// @throws graft::Error (kData) on every rank if any rank cannot write; earlier checkpoints are
/// untouched
void save_checkpoint(OutputDirectory& output, Workbench& bench, Trainer& trainer, const Run& run);

/// The adapter of state().best_step takes the place of the last one. Collective.
/// @throws graft::Error (kNoCheckpoint) if it is damaged or gone
void load_best_adapter(const OutputDirectory& output, Workbench& bench, Trainer& trainer);

/// Writes the trained adapters in PEFT's layout into output_dir/adapter, which changes as a whole.
/// Collective.
void save_adapter(const OutputDirectory& output, const Workbench& bench, const Run& run);

}  // namespace graft::launcher
