// Fixed random matrices that all adapters of a method share (VeRA and its like), drawn as PyTorch
// does on the CPU: a file that holds only their seed means the same numbers here.
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

/// Lists a shared matrix as one that is saved, under base_model.<name>.
void add_projection(AttachContext& context, const std::string& name, const Tensor& value);

}  // namespace graft::peft
