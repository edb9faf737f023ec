#include "launcher/plan/limit.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>

#include "kernels/gemm/gemm.h"

namespace graft::launcher {

double flops_per_token(const models::ModelInfo& info, int64_t trained, int64_t length,
                       models::Recompute recompute) {
  const auto blocks = static_cast<double>(info.block_macs);
  const double matrices = blocks + static_cast<double>(info.head_macs);
  const double attention =
      static_cast<double>(info.attention_macs) * static_cast<double>(length);  // half of them seen
  const double plain = 4 * matrices + 3.5 * attention + 6 * static_cast<double>(trained);
  return recompute == models::Recompute::kOn ? plain + 2 * blocks + attention : plain;
}

double matmul_rate(at::Device device, at::ScalarType dtype) {
  using Clock = std::chrono::steady_clock;
  const int64_t size = device.is_cpu() ? 768 : 8192;
  const auto options = at::TensorOptions().device(device).dtype(dtype);
  const at::Tensor a = at::ones({size, size}, options), b = at::ones({size, size}, options);
  double best = 0;
  const auto end = Clock::now() + std::chrono::milliseconds(200);
  for (int i = 0; i < 3 || Clock::now() < end; ++i) {
    const auto start = Clock::now();
    // Reading one number waits for the device.
    kernels::gemm(a, b).select(0, 0).select(0, 0).item<float>();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    best = std::max(best, 2.0 * static_cast<double>(size * size * size) / seconds);
  }
  return best;
}

}  // namespace graft::launcher
