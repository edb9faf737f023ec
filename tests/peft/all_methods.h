// What the contracts of CPU and GPU run over: the registered methods and the living skeleton, each
// with options that fit the tiny models.
#pragma once

#include <map>
#include <string>

#include "peft/method.h"

namespace graft::peft {

void register_example(MethodRegistry& registry,
                      const MethodFacts& facts);  // peft/methods/example.cpp

inline const MethodRegistry& registry() {
  static const MethodRegistry all = [] {
    MethodRegistry r = methods();
    register_example(r, {"example", "reparam", "arXiv:2205.05638", "y = l * (W x + b)"});
    return r;
  }();
  return all;
}

/// Options of the run with defaults: only what does not fit models this small (randlora's update is
/// some 10 times their weights).
inline std::string defaults(const std::string& method) {
  static const std::map<std::string, std::string> fitted = {
      {"adapter_drop", "{leave_out: [0], drop_up_to: 0}"},  // of two layers one
      {"c3a", "{target_modules: all-linear}"},              // moves by 1 / in of a value
      {"fish_mask", "{keep: 0.1}"},  // of the tiny matrices, so that each has some
      {"fourierft", "{n_frequency: 300}"},
      {"mam",  // fewer kinks of ReLU
       "{prefix_tuning: {num_virtual_tokens: 3, encoder_hidden_size: 24}, bottleneck: "
       "{non_linearity: silu}}"},
      {"lora_sparse", "{init_weights: normal, mimic_weight: 30}"},  // learns by its own loss alone
      {"gralora", "{r: 8}"},
      {"hira", "{r: 8}"},
      {"lily", "{r: 8}"},
      {"miss", "{r: 16}"},
      {"p_tuning", "{num_virtual_tokens: 3, encoder_hidden_size: 24}"},  // fewer kinks of ReLU
      {"psoft", "{r: 8}"},
      {"randlora", "{randlora_alpha: 8}"},
      {"road", "{group_size: 16}"},
      {"shira", "{r: 8}"},
      {"supertuning", "{target_modules: all-linear, sparsity: 0.7}"},
      {"tinylora", "{target_modules: all-linear, r: 8}"},
      {"trainable_tokens",
       "{token_indices: [11, 48, 85, 122, 32, 69, 106, 16, 53, 90, 0, 37, 74, 111, 21, 58]}"},
      {"unilora", "{init_theta_d_bound: 0.5}"},
      {"vblora", "{vector_length: 16, num_vectors: 6, init_logits_std: 1}"},
      {"waveft", "{n_frequency: 300, scaling: 4}"},
  };
  return fitted.contains(method) ? fitted.at(method) : "{}";
}

}  // namespace graft::peft
