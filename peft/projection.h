// What the adapters of a method share: fixed random matrices (VeRA and its like), drawn as PyTorch
// does on the CPU, so that a file that holds only their seed means the same numbers here; and
// trained tensors.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "peft/attach.h"

namespace graft::peft {

/// The widest input and output among slots.
struct Widths {
  int64_t in = 0, out = 0;
};
Widths widest(const std::vector<const LinearSite*>& sites);

/// torch.Generator("cpu").manual_seed(seed)
at::Generator torch_generator(uint64_t seed);

/// What torch.nn.init.kaiming_uniform_(tensor, a, generator=...) puts into an empty CPU tensor.
/// @param negative_slope  PyTorch's `a`
Tensor torch_kaiming_uniform(at::IntArrayRef shape, double negative_slope,
                             const at::Generator& generator, at::ScalarType dtype = at::kFloat);

/// What slots train together: its gradient is the sum over their stages.
/// @param name  without the method's prefix
void add_shared(AttachContext& context, const std::string& name, const std::string& hf_key,
                const Tensor& value, const std::vector<const LinearSite*>& sites);

/// Lists a shared matrix as one that is saved, under base_model.<name>.
void add_projection(AttachContext& context, const std::string& name, const Tensor& value);

}  // namespace graft::peft
