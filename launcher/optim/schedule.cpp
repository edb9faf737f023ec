#include "launcher/optim/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "configs/check.h"

namespace graft::launcher {

double Schedule::operator()(int64_t step) const {
  const auto s = static_cast<double>(step), warmup = static_cast<double>(warmup_steps);
  if (step < warmup_steps) return peak * s / std::max(1.0, warmup);
  const double left = static_cast<double>(max_steps - warmup_steps);
  const double progress = std::min(1.0, (s - warmup) / std::max(1.0, left));
  if (type == "constant") return peak;
  if (type == "linear") return peak * (1 - progress);
  if (type == "cosine") return peak * 0.5 * (1 + std::cos(std::numbers::pi * progress));
  GRAFT_ASSERT(type == "wsd", type);
  // Warm-up, stable, and a cosine decay over the last tenth of the steps.
  const double decay_steps = std::max(1.0, std::floor(static_cast<double>(max_steps) * 0.1));
  const double decayed =
      std::clamp((s - (static_cast<double>(max_steps) - decay_steps)) / decay_steps, 0.0, 1.0);
  return peak * 0.5 * (1 + std::cos(std::numbers::pi * decayed));
}

}  // namespace graft::launcher
