#include "models/nn/rope.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "configs/check.h"

namespace graft::models {
namespace {

std::vector<float> plain(double theta, int64_t head_dim) {
  std::vector<float> f(static_cast<size_t>(head_dim / 2));
  for (size_t i = 0; i < f.size(); ++i) {
    f[i] = 1.0F / std::pow(static_cast<float>(theta),
                           static_cast<float>(2 * i) / static_cast<float>(head_dim));
  }
  return f;
}

void scale_llama3(const RopeConfig& c, double original, std::vector<float>& f) {
  const double low_wavelength = original / c.low_freq_factor;
  const double high_wavelength = original / c.high_freq_factor;
  for (float& x : f) {
    const double wavelength = 2 * std::numbers::pi / x;
    if (wavelength < high_wavelength) continue;
    const double scaled = x / c.factor;
    const double smooth =
        (original / wavelength - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor);
    x = static_cast<float>(wavelength > low_wavelength ? scaled
                                                       : (1 - smooth) * scaled + smooth * x);
  }
}

double yarn_mscale(double scale, double m) {
  return scale <= 1 ? 1 : 0.1 * m * std::log(scale) + 1;
}

float scale_yarn(const RopeConfig& c, int64_t head_dim, double original, std::vector<float>& f) {
  const auto dimension = [&](double rotations) {
    return static_cast<double>(head_dim) * std::log(original / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(c.theta));
  };
  double low = dimension(c.beta_fast), high = dimension(c.beta_slow);
  if (c.truncate) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0), high = std::min(high, static_cast<double>(head_dim - 1));
  if (low == high) high += 0.001;
  for (size_t i = 0; i < f.size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    f[i] = static_cast<float>(f[i] / c.factor * ramp + f[i] * (1 - ramp));
  }
  if (c.attention_factor > 0) return static_cast<float>(c.attention_factor);
  if (c.mscale > 0 && c.mscale_all_dim > 0) {
    return static_cast<float>(yarn_mscale(c.factor, c.mscale) /
                              yarn_mscale(c.factor, c.mscale_all_dim));
  }
  return static_cast<float>(yarn_mscale(c.factor, 1));
}

float scale_longrope(const RopeConfig& c, double original, int64_t length, std::vector<float>& f) {
  const auto& factors = static_cast<double>(length) > original ? c.long_factor : c.short_factor;
  GRAFT_ASSERT(factors.size() == f.size(), factors.size());
  for (size_t i = 0; i < f.size(); ++i) f[i] = static_cast<float>(f[i] / factors[i]);
  if (c.attention_factor > 0) return static_cast<float>(c.attention_factor);
  if (c.factor <= 1) return 1.0F;
  return static_cast<float>(std::sqrt(1 + std::log(c.factor) / std::log(original)));
}

}  // namespace

std::pair<std::vector<float>, float> inverse_frequencies(const RopeConfig& c, int64_t head_dim,
                                                         int64_t max_length, int64_t length) {
  const auto original = static_cast<double>(c.original_length);
  std::vector<float> f = plain(c.theta, head_dim);
  if (c.type == "default") return {f, 1.0F};
  if (c.type == "linear") {
    for (float& x : f) x = static_cast<float>(x / c.factor);
    return {f, 1.0F};
  }
  if (c.type == "dynamic") {
    const auto n = static_cast<double>(std::max(length, max_length));
    const auto d = static_cast<double>(head_dim);
    const double grown = c.factor * n / static_cast<double>(max_length) - (c.factor - 1);
    return {plain(c.theta * std::pow(grown, d / (d - 2)), head_dim), 1.0F};
  }
  if (c.type == "llama3") {
    scale_llama3(c, original, f);
    return {f, 1.0F};
  }
  if (c.type == "yarn") {
    const float factor = scale_yarn(c, head_dim, original, f);
    return {f, factor};
  }
  GRAFT_ASSERT(c.type == "longrope", c.type);
  const float factor = scale_longrope(c, original, length, f);
  return {f, factor};
}

std::pair<Tensor, Tensor> rope_tables(const RopeConfig& config, int64_t head_dim,
                                      int64_t max_length, const Tensor& positions_BL) {
  // Only two rules look at the length; the others must not pay for a look at device memory.
  const bool needs_length = config.type == "dynamic" || config.type == "longrope";
  const int64_t length = needs_length ? positions_BL.max().item<int64_t>() + 1 : 0;
  const auto [f, factor] = inverse_frequencies(config, head_dim, max_length, length);
  const Tensor frequencies = at::tensor(f).to(positions_BL.device());
  const Tensor half = positions_BL.to(at::kFloat).unsqueeze(-1) * frequencies;
  const Tensor angles = at::cat({half, half}, -1);
  return {angles.cos() * factor, angles.sin() * factor};
}

}  // namespace graft::models
