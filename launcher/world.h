// World: this process among the ranks of the job: topology, communicators, device, threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "dist/comm_factory.h"
#include "dist/topology.h"
#include "dist/watchdog.h"
#include "launcher/run_config.h"

namespace graft::launcher {

struct World {
  dist::Topology topology;
  std::unique_ptr<dist::Watchdog> watchdog;  ///< of the calls of `host`; null in a world of one
  std::unique_ptr<dist::Comm>
      host;  ///< all ranks, CPU tensors: control, and all traffic of a CPU run
  std::unique_ptr<dist::Comm> device_comm;  ///< all ranks, CUDA tensors; null on a CPU
  at::Device device = at::kCPU;
  int threads = 1;

  int rank() const { return host->rank(); }
  int size() const { return host->size(); }
  /// All ranks, for tensors on `device`.
  dist::Comm& comm() const { return device_comm ? *device_comm : *host; }
};

/// Finds the ranks and starts what they need. Collective.
/// @param session  null when no launcher started this process
World join_world(const dist::Topology& topology, dist::MpiSession* session,
                 const ParallelConfig& config);

/// The compute dtype: `auto` is bfloat16 on a GPU, float32 on a CPU.
at::ScalarType compute_dtype(const std::string& name, at::Device device);

}  // namespace graft::launcher
