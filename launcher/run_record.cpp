#include "launcher/run_record.h"

#include <ATen/Version.h>
#include <torch/version.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "kernels/device.h"
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

/// "1 node", "2 nodes".
std::string counted(int64_t n, const std::string& what) {
  return std::to_string(n) + " " + what + (n == 1 ? "" : "s");
}

std::string device_text(const World& world) {
  return world.device.is_cuda() ? world.device.str() : counted(world.threads, "CPU thread");
}

/// As the run file writes it.
std::string dtype_text(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? "bfloat16" : "float32";
}

/// The words this process was started with.
std::vector<std::string> command_line() {
  std::ifstream in("/proc/self/cmdline", std::ios::binary);
  std::vector<std::string> words;
  for (std::string word; std::getline(in, word, '\0');) words.push_back(word);
  return words;
}

#ifdef GRAFT_WITH_CUDA
std::string gpu_name(at::Device device) {
  cudaDeviceProp gpu{};
  if (device.is_cuda()) CUDA_CHECK(cudaGetDeviceProperties(&gpu, device.index()));
  return gpu.name;
}
#else
std::string gpu_name(at::Device) { return ""; }
#endif

/// What the ranks say, each text once, in the order of the ranks.
std::vector<std::string> different_texts(World& world, const std::string& text) {
  std::vector<std::string> seen;
  for (const std::string& other : dist::gather_texts(*world.host, text)) {
    if (!other.empty() && std::find(seen.begin(), seen.end(), other) == seen.end())
      seen.push_back(other);
  }
  return seen;
}

}  // namespace

nlohmann::ordered_json run_record(const Workbench& bench, const Run& run) {
  const dist::Topology& t = bench.world.topology;
  return {{"graft", version_text()},
          {"libtorch", TORCH_VERSION},
          {"started", utc_now()},
          {"command", command_line()},
          {"hosts", different_texts(bench.world, t.host)},
          {"gpus", different_texts(bench.world, gpu_name(bench.world.device))},
          {"world", t.world},
          {"nodes", t.num_nodes},
          {"launcher", t.source},
          {"device", bench.world.device.str()},
          {"threads_per_rank", bench.world.threads},
          {"compute_dtype", dtype_text(bench.dtype)},
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
  const data::Loader& loader = trainer.loader();
  std::string step = std::to_string(trainer.num_lanes()) + " x " +
                     std::to_string(run.train.per_device_train_batch_size) + " x " +
                     std::to_string(run.data.max_length) + " tokens";
  if (trainer.lanes_per_gather() < trainer.num_lanes() / ranks)
    step += " (each gather serves " + counted(trainer.lanes_per_gather(), "lane") +
            " of a rank's " + std::to_string(trainer.num_lanes() / ranks) + ")";
  return "base     " + run.model.name_or_path + "  " + count_text(base) + " parameters, " +
         run.model.quantization + ", " + bytes_text(bench.store->resident_bytes()) + " a rank\n" +
         "train    " + methods + "  " + count_text(trained) + " parameters (" + share + ")\n" +
         "data     " + counted(loader.num_documents(), "document") + ", " +
         std::to_string(loader.num_cut_documents()) + " longer than data.max_length (cut)\n" +
         "step     " + step + ", " + counted(trainer.max_steps(), "step") + " from " +
         std::to_string(trainer.state().step) + "\n" + "optim    " + run.train.optim + ", " +
         bytes_text(trainer.optimizer().state_bytes()) + " of state a rank\n" + "ranks    " +
         std::to_string(ranks) + " on " + counted(bench.world.topology.num_nodes, "node") + ", " +
         device_text(bench.world) + " each, " + dtype_text(bench.dtype);
}

std::string log_file(const std::string& output_dir, int rank) {
  std::filesystem::create_directories(output_dir + "/logs");
  return output_dir + "/logs/rank-" + std::to_string(rank) + ".log";
}

}  // namespace graft::launcher
