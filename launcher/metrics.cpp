#include "launcher/metrics.h"

#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "launcher/checkpoint/manifest.h"
#include "launcher/plan/limit.h"

namespace graft::launcher {
namespace {

std::string fixed(double value, const char* pattern) {
  char text[48];
  std::snprintf(text, sizeof text, pattern, value);
  return text;
}

/// The lines of an earlier attempt up to `step`.
std::string lines_until(const std::string& path, int64_t step) {
  std::ifstream in(path);
  std::string kept;
  for (std::string line; std::getline(in, line);) {
    const auto object = nlohmann::json::parse(line, nullptr, false);
    if (object.is_object() && object.value("step", int64_t{0}) <= step) kept += line + '\n';
  }
  return kept;
}

}  // namespace

int64_t peak_memory_bytes(at::Device device) {
  if (!device.is_cpu()) {
    const auto stats = at::accelerator::getDeviceStats(device.index());
    return stats.reserved_bytes
        .at(static_cast<size_t>(at::CachingDeviceAllocator::StatType::AGGREGATE))
        .peak;
  }
  // Not getrusage: its peak outlives exec, so a large process that starts the run would count.
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stoll(line.substr(6)) * 1024;
  }
  return 0;
}

Metrics::Metrics(const Run& run, int64_t resumed_step, Workbench& bench) : bench_(bench) {
  const auto flops = [&](models::Recompute recompute) {
    return flops_per_token(bench.model->info(), bench.adapters->params().numel(),
                           run.data.max_length, recompute);
  };
  flops_ = flops(models::Recompute::kOff);
  flops_done_ = run.train.gradient_checkpointing ? flops(models::Recompute::kOn) : flops_;
  bench_.world.host->barrier();
  at::Tensor rate = at::full({1}, matmul_rate(bench_.world.device, bench_.dtype), at::kDouble);
  bench_.world.host->all_reduce(rate, dist::Traffic::kControl);
  matmul_rate_ = rate.item<double>();
  if (bench_.world.rank() != 0) return;
  const std::string path = run.checkpoint.output_dir + "/metrics.jsonl";
  write_text(path, lines_until(path, resumed_step));
  out_.open(path, std::ios::app);
  GRAFT_CHECK(out_.good(), path, ": cannot be written");
}

void Metrics::step(const StepResult& r, Trainer& trainer, const Run& run,
                   const std::optional<EvalResult>& evaluation) {
  const int64_t step = trainer.state().step;
  if (bench_.world.rank() != 0) return;
  const double tokens_per_s = static_cast<double>(r.tokens) * 1000 / r.step_ms;
  std::string details = "step " + std::to_string(step) + "/" + std::to_string(trainer.max_steps()) +
                        "  loss " + fixed(r.loss, "%.4f") + "  " + fixed(tokens_per_s, "%.0f") +
                        " tok/s";
  const bool has_accuracy = evaluation && run.eval.wants("accuracy");
  if (evaluation) details += "  eval " + fixed(evaluation->loss, "%.4f");
  if (has_accuracy) details += "  accuracy " + fixed(evaluation->accuracy(), "%.4f");
  progress_.update(step, trainer.max_steps(), details);
  if (step % run.log.logging_steps != 0 && step != trainer.max_steps() && !evaluation) return;
  nlohmann::ordered_json line = {
      {"step", step},
      {"epoch", r.epoch},
      {"task", nullptr},
      {"loss", r.targets > 0 ? nlohmann::ordered_json(r.loss) : nlohmann::ordered_json(nullptr)},
      {"eval_loss",
       evaluation ? nlohmann::ordered_json(evaluation->loss) : nlohmann::ordered_json(nullptr)},
      {"learning_rate", r.learning_rate},
      {"grad_norm", r.grad_norm},
      {"tokens", trainer.state().tokens},
      {"tokens_per_s", tokens_per_s},
      {"step_ms", r.step_ms},
      {"data_wait_ms", r.data_wait_ms},
      {"peak_memory_bytes", peak_memory_bytes(bench_.world.device)},
      {"bytes_gathered", r.bytes_gathered},
      {"bytes_reduced", r.bytes_reduced},
      {"mfu", tokens_per_s * flops_ / matmul_rate_},
      {"limit_fraction", tokens_per_s * flops_done_ / matmul_rate_}};
  if (has_accuracy) line["eval_accuracy"] = evaluation->accuracy();
  out_ << line.dump() << '\n' << std::flush;
  GRAFT_CHECK(out_.good(), ExitCode::kData, "metrics.jsonl cannot be written: is the disk full?");
}

}  // namespace graft::launcher
