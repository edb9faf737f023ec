#include "peft/projection.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>

namespace graft::peft {

Widths widest(const std::vector<const LinearSite*>& sites) {
  Widths most;
  for (const LinearSite* site : sites) {
    most.in = std::max(most.in, site->info.in);
    most.out = std::max(most.out, site->info.out);
  }
  return most;
}

at::Generator torch_generator(uint64_t seed) {
  return at::make_generator<at::CPUGeneratorImpl>(seed);
}

Tensor torch_kaiming_uniform(at::IntArrayRef shape, double negative_slope,
                             const at::Generator& generator, at::ScalarType dtype) {
  Tensor out = at::empty(shape, at::TensorOptions().dtype(dtype));
  const double gain = std::sqrt(2.0 / (1 + negative_slope * negative_slope));
  const double fan = static_cast<double>(out[0].numel());
  const double bound = std::sqrt(3.0) * (gain / std::sqrt(fan));
  return out.uniform_(-bound, bound, generator);
}

void add_shared(AttachContext& context, const std::string& name, const std::string& hf_key,
                const Tensor& value, const std::vector<const LinearSite*>& sites) {
  Param param{.name = context.prefix + name, .hf_key = hf_key, .value = value};
  const auto [low, high] = std::minmax_element(
      sites.begin(), sites.end(),
      [](const LinearSite* a, const LinearSite* b) { return a->stage < b->stage; });
  param.stage = (*low)->stage, param.last_stage = (*high)->stage;
  context.params.add(std::move(param));
}

void add_projection(AttachContext& context, const std::string& name, const Tensor& value) {
  context.params.add(Constant{context.prefix + name, "base_model." + name, value});
}

}  // namespace graft::peft
