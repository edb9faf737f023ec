// Metrics: metrics.jsonl, one object a logged step, and the console line. Rank 0 writes; numbers in
// ms and bytes, memory and traffic per rank.
#pragma once

#include <cstdint>
#include <fstream>
#include <optional>
#include <string>

#include "launcher/evaluate.h"
#include "launcher/progress.h"
#include "launcher/trainer.h"

namespace graft::launcher {

class Metrics {
 public:
  /// Opens output_dir/metrics.jsonl; lines of steps after `resumed_step` are dropped: they will be
  /// made again.
  /// Collective: the ranks measure their matrix products together.
  Metrics(const Run& run, int64_t resumed_step, Workbench& bench);
  /// @param evaluation  of the held-out rows after this step, if there was one
  void step(const StepResult& result, Trainer& trainer, const Run& run,
            const std::optional<EvalResult>& evaluation);
  void finish() { progress_.finish(); }

 private:
  Workbench& bench_;
  std::ofstream out_;
  Progress progress_{"training"};
  double flops_, flops_done_;  ///< of a token: needed, and with what recomputation repeats
  double matmul_rate_;         ///< of all ranks, operations a second
};

/// The most memory this process ever held, in bytes: of the device on a GPU, else resident.
int64_t peak_memory_bytes(at::Device device);

}  // namespace graft::launcher
