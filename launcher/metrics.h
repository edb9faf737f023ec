// Metrics: metrics.jsonl, one object a logged step, and the console line. Rank 0 writes; numbers in
// ms and bytes, memory and traffic per rank.
#pragma once

#include <chrono>
#include <cstdint>
#include <fstream>
#include <optional>
#include <string>

#include "launcher/progress.h"
#include "launcher/trainer.h"

namespace graft::launcher {

class Metrics {
 public:
  /// Opens output_dir/metrics.jsonl; lines of steps after `resumed_step` are dropped: they will be
  /// made again.
  Metrics(const std::string& output_dir, int64_t resumed_step, Workbench& bench);
  void step(const StepResult& result, Trainer& trainer, std::optional<double> eval_loss,
            int64_t logging_steps);
  void finish() { progress_.finish(); }

 private:
  using Clock = std::chrono::steady_clock;
  Workbench& bench_;
  std::ofstream out_;
  Progress progress_{"training"};
  Clock::time_point last_ = Clock::now();
  int64_t gathered_ = 0, reduced_ = 0;  ///< bytes so far
};

/// The most memory this process ever held, in bytes: of the device on a GPU, else resident.
int64_t peak_memory_bytes(at::Device device);

}  // namespace graft::launcher
