#include "launcher/run_record.h"

#include <ATen/Version.h>
#include <torch/version.h>

#include <chrono>
#include <cstdio>
#include <filesystem>

#include "launcher/facts.h"
#include "launcher/progress.h"
#include "launcher/version.h"

namespace graft::launcher {
namespace {

std::string utc_now() {
  const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  return text;
}

std::string device_text(const World& world) {
  return world.device.is_cuda() ? world.device.str()
                                : std::to_string(world.threads) + " CPU threads";
}

}  // namespace

nlohmann::ordered_json run_record(const Workbench& bench, const Run& run) {
  const dist::Topology& t = bench.world.topology;
  return {{"graft", version_text()},
          {"libtorch", TORCH_VERSION},
          {"started", utc_now()},
          {"host", t.host},
          {"world", t.world},
          {"nodes", t.num_nodes},
          {"launcher", t.source},
          {"device", bench.world.device.str()},
          {"threads_per_rank", bench.world.threads},
          {"compute_dtype", c10::toString(bench.dtype)},
          {"seed", run.train.seed},
          {"base", run.model.name_or_path},
          {"base_fingerprint", bench.fingerprint},
          {"trainable_parameters", bench.adapters->params().numel()}};
}

std::string banner(const Workbench& bench, Trainer& trainer, const Run& run) {
  const int64_t base = num_parameters(*bench.model), trained = bench.adapters->params().numel();
  char share[16];
  std::snprintf(share, sizeof share, "%.2f %%",
                100.0 * static_cast<double>(trained) / static_cast<double>(base));
  std::string methods;
  for (const auto& entry : run.peft) methods += (methods.empty() ? "" : " + ") + entry.name;
  const int ranks = bench.world.size();
  return "base     " + run.model.name_or_path + "  " + count_text(base) + " parameters, " +
         run.model.quantization + ", " + bytes_text(bench.store->resident_bytes()) + " a rank\n" +
         "train    " + methods + "  " + count_text(trained) + " parameters (" + share + ")\n" +
         "step     " + std::to_string(trainer.num_lanes()) + " x " +
         std::to_string(run.train.per_device_train_batch_size) + " x " +
         std::to_string(run.data.max_length) + " tokens, " + std::to_string(trainer.max_steps()) +
         " steps from " + std::to_string(trainer.state().step) + ", " +
         std::to_string(trainer.loader().num_documents()) + " documents\n" + "ranks    " +
         std::to_string(ranks) + " on " + std::to_string(bench.world.topology.num_nodes) +
         " node(s), " + device_text(bench.world) + " each, " + c10::toString(bench.dtype);
}

std::string log_file(const std::string& output_dir, int rank) {
  std::filesystem::create_directories(output_dir + "/logs");
  return output_dir + "/logs/rank-" + std::to_string(rank) + ".log";
}

std::string checkpoint_path(const std::string& output_dir, int64_t step) {
  char name[32];
  std::snprintf(name, sizeof name, "/checkpoints/step-%08lld", static_cast<long long>(step));
  return output_dir + name;
}

}  // namespace graft::launcher
