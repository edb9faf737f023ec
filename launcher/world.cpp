#include "launcher/world.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <sched.h>

#include <algorithm>
#include <chrono>

#include "configs/check.h"
#include "configs/log.h"

namespace graft::launcher {
namespace {

/// The ranks of a node take its GPUs in turn, so more of them share: make_nccl_comm() says so.
at::Device device_of_rank(const dist::Topology& topology) {
  if (!at::hasCUDA()) return at::kCPU;
  const auto devices = static_cast<int>(at::getNumGPUs());
  return {at::kCUDA, static_cast<c10::DeviceIndex>(topology.local_rank % devices)};
}

#ifdef GRAFT_WITH_CUDA
std::unique_ptr<dist::Comm> device_comm_of(dist::Comm& host, at::Device device,
                                           std::chrono::seconds deadline) {
  return device.is_cuda() ? dist::make_nccl_comm(host, device.index(), deadline) : nullptr;
}
#else
std::unique_ptr<dist::Comm> device_comm_of(dist::Comm&, at::Device, std::chrono::seconds) {
  return nullptr;
}
#endif

/// Watches the calls of `world.host`; a rank that keeps the others waiting ends the job.
void start_watchdog(World& world, dist::MpiSession& session, std::chrono::seconds deadline) {
  const auto end_job = [&session](const std::string& verdict) {
    log::error(verdict +
               ". The job ends here. Look at that rank, its machine and its log; if it only needs "
               "longer, raise parallel.timeout_s.");
    session.abort(ExitCode::kCommunication);
  };
  world.watchdog =
      std::make_unique<dist::Watchdog>(*world.host, world.topology.host, deadline, end_job);
  world.host = dist::make_watched_comm(*world.watchdog, std::move(world.host));
}

/// The cores this rank may use (mpirun and Slurm bind ranks), shared with the ranks that may use
/// the same ones. Collective.
int threads_of_rank(dist::Comm& host_comm, const std::string& host) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  if (sched_getaffinity(0, sizeof cores, &cores) != 0) return 1;  // more cores than a cpu_set_t has
  const std::string mine =
      host + " " + std::string(reinterpret_cast<const char*>(&cores), sizeof cores);
  const auto all = dist::gather_texts(host_comm, mine);
  return std::max(1,
                  CPU_COUNT(&cores) / static_cast<int>(std::count(all.begin(), all.end(), mine)));
}

}  // namespace

World join_world(const dist::Topology& topology, dist::MpiSession* session,
                 const ParallelConfig& config) {
  World world;
  world.topology = topology;
  const std::chrono::seconds deadline(config.timeout_s);
  world.host = session != nullptr ? dist::make_mpi_comm() : dist::make_single_comm();
  if (session != nullptr) start_watchdog(world, *session, deadline);
  dist::place_on_nodes(world.topology, *world.host);
  world.device = device_of_rank(world.topology);
  world.device_comm = device_comm_of(*world.host, world.device, deadline);
  const int share = threads_of_rank(*world.host, world.topology.host);
  world.threads = config.threads_per_rank.value.value_or(share);
  at::set_num_threads(world.threads);
  return world;
}

at::ScalarType compute_dtype(const std::string& name, at::Device device) {
  if (name == "auto") return device.is_cuda() ? at::kBFloat16 : at::kFloat;
  return name == "bfloat16" ? at::kBFloat16 : at::kFloat;
}

}  // namespace graft::launcher
