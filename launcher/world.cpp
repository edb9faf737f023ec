#include "launcher/world.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <thread>

#include "configs/check.h"

namespace graft::launcher {
namespace {

#ifdef GRAFT_WITH_CUDA
std::unique_ptr<dist::Comm> device_comm_of(dist::Comm& host, at::Device device) {
  return device.is_cuda() ? dist::make_nccl_comm(host, device.index(), std::chrono::minutes(5))
                          : nullptr;
}
#else
std::unique_ptr<dist::Comm> device_comm_of(dist::Comm&, at::Device) { return nullptr; }
#endif

}  // namespace

World join_world(const dist::Topology& topology, dist::MpiSession* session,
                 const ParallelConfig& config) {
  World world;
  world.topology = topology;
  world.host = session != nullptr ? dist::make_mpi_comm() : dist::make_single_comm();
  dist::place_on_nodes(world.topology, *world.host);
  if (at::hasCUDA())
    world.device = at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(world.topology.local_rank));
  world.device_comm = device_comm_of(*world.host, world.device);
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  world.threads =
      config.threads_per_rank.value.value_or(std::max(1, cores / world.topology.local_world));
  at::set_num_threads(world.threads);
  return world;
}

at::ScalarType compute_dtype(const std::string& name, at::Device device) {
  if (name == "auto") return device.is_cuda() ? at::kBFloat16 : at::kFloat;
  return name == "bfloat16" ? at::kBFloat16 : at::kFloat;
}

}  // namespace graft::launcher
