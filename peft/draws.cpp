#include "peft/draws.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <cmath>
#include <limits>
#include <unordered_map>

namespace graft::peft {

namespace {

Tensor empty(at::IntArrayRef shape, at::Device device) {
  return at::empty(shape, at::TensorOptions().dtype(at::kFloat).device(device));
}

}  // namespace

Tensor draw_uniform(at::IntArrayRef shape, double bound, kernels::Key key, at::Device device) {
  const Tensor t = empty(shape, device);
  kernels::uniform(t, key);
  return t.mul_(2).sub_(1).mul_(bound);
}

Tensor draw_kaiming(at::IntArrayRef shape, kernels::Key key, at::Device device) {
  double fan_in = 1;
  for (const int64_t size : shape.slice(1)) fan_in *= static_cast<double>(size);
  return draw_uniform(shape, 1 / std::sqrt(fan_in), key, device);
}

Tensor draw_normal(at::IntArrayRef shape, double deviation, kernels::Key key, at::Device device) {
  const Tensor t = empty(shape, device);
  kernels::normal(t, key);
  return t.mul_(deviation);
}

Tensor draw_truncated_normal(at::IntArrayRef shape, double deviation, kernels::Key key,
                             at::Device device) {
  const Tensor u = at::empty(shape, at::kFloat);
  kernels::uniform(u, key);
  const double within = std::erf(2 / std::sqrt(2.0));  // the share of draws that are not cut
  const Tensor t = u.to(at::kDouble).mul_(2).sub_(1).mul_(within).erfinv_();
  return t.mul_(std::sqrt(2.0) * deviation).to(device, at::kFloat);
}

Tensor dropout(const Tensor& x, double probability, const models::Pass& pass, kernels::Key key) {
  if (probability == 0 || !pass.training) return x;
  const Tensor mask = empty(x.sizes(), x.device());
  kernels::dropout_mask(mask, kernels::derive(pass.random, key.stream), probability);
  return x * mask.to(x.scalar_type());
}

// PyTorch shuffles by Fisher and Yates from the front, so the first elements are known after as
// many swaps; `moved` holds the few places that do not hold their own number. From a certain n on
// PyTorch shuffles differently, and all of it is needed.
Tensor first_of_randperm(int64_t n, int64_t count, uint64_t seed) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  if (n >= std::numeric_limits<uint32_t>::max() / 20)
    return at::randperm(n, generator, at::kLong).slice(0, 0, count).clone();
  auto& engine = *at::check_generator<at::CPUGeneratorImpl>(generator);
  Tensor first = at::empty({count}, at::kLong);
  std::unordered_map<int64_t, int64_t> moved;
  const auto at_place = [&](int64_t i) {
    const auto found = moved.find(i);
    return found == moved.end() ? i : found->second;
  };
  for (int64_t i = 0; i < count; ++i) {
    // The last one is what is left: PyTorch draws for n - 1.
    const int64_t other = i == n - 1 ? i : i + static_cast<int64_t>(engine.random() % (n - i));
    const int64_t value = at_place(other);
    moved[other] = at_place(i);
    first.data_ptr<int64_t>()[i] = value;
  }
  return first;
}

}  // namespace graft::peft
