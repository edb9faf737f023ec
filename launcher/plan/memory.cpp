#include "launcher/plan/memory.h"

#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

namespace graft::launcher {
namespace {

/// Of the node, in bytes: what the kernel says programs may still take.
int64_t available_host_bytes() {
  std::ifstream in("/proc/meminfo");
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with("MemAvailable:")) return std::stoll(line.substr(13)) * 1024;
  }
  return std::numeric_limits<int64_t>::max();  // no such file: nothing is known, nothing is bounded
}

}  // namespace

int64_t lane_bytes(const models::ModelInfo& info, int64_t tokens, models::Recompute recompute,
                   at::ScalarType dtype) {
  const int64_t numbers = recompute == models::Recompute::kOn
                              ? (info.num_layers + 2) * info.hidden_size
                              : 2 * info.block_macs / info.hidden_size;
  return numbers * tokens * static_cast<int64_t>(c10::elementSize(dtype));
}

int64_t free_memory_bytes(const World& world) {
  if (world.device.is_cpu()) return available_host_bytes() / world.topology.local_world;
  const auto index = world.device.index();
  const auto [free, total] = at::accelerator::getMemoryInfo(index);
  const auto stats = at::accelerator::getDeviceStats(index);
  const auto of_all = static_cast<size_t>(at::CachingDeviceAllocator::StatType::AGGREGATE);
  const int64_t cached =
      stats.reserved_bytes.at(of_all).current - stats.allocated_bytes.at(of_all).current;
  return static_cast<int64_t>(free) + cached;
}

int64_t lanes_that_fit(const World& world, int64_t lanes, int64_t bytes_of_a_lane) {
  const at::Tensor mine = at::full(
      {1}, std::max<int64_t>(1, free_memory_bytes(world) / 2 / bytes_of_a_lane), at::kLong);
  at::Tensor all = at::empty({world.size()}, at::kLong);
  world.host->all_gather(mine, all, dist::Traffic::kControl, lanes)->wait();
  return std::min(lanes, all.min().item<int64_t>());
}

}  // namespace graft::launcher
