// ParamSet: everything trainable, in a fixed order: the order of gradients, of moments and of what
// is saved.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace graft::peft {

using at::Tensor;

struct Param {
  std::string name;    ///< "0.block.3.attn.q.lora_a": method's place in the list, slot, leaf
  std::string hf_key;  ///< "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
  Tensor value;        ///< float32 leaf that requires grad
  int stage = 0;       ///< where the trunk finds its gradient
};

class ParamSet {
 public:
  void add(Param param);
  const std::vector<Param>& all() const { return params_; }
  bool empty() const { return params_.empty(); }
  int64_t numel() const;
  int lowest_stage() const;  ///< of an empty set: INT_MAX
  /// XXH3-128 over names and bytes, hex: equal on all ranks, or one of them is broken.
  std::string hash() const;

 private:
  std::vector<Param> params_;
  std::unordered_set<std::string> names_;
};

}  // namespace graft::peft
