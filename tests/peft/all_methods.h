// What the contracts of CPU and GPU run over: the registered methods and the living skeleton, each
// with options that fit the tiny models.
#pragma once

#include <map>
#include <string>

#include "peft/method.h"
#include "tests/peft/tiny.h"

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

/// A list of two LoRAs that fit every tiny model, one that helps and one that harms.
inline std::string tiny_loras() {
  static const TestFolder folder;
  const auto write = [](const std::string& name, const std::vector<std::string>& modules,
                        double size) {
    const std::string directory = folder.path() + "/" + name;
    models::io::NamedTensors tensors;
    for (const std::string& module : modules) {
      const int64_t in = module == "down_proj" ? 80 : 48, out = 128 - in;
      for (const char* layer : {"0", "1"}) {
        const std::string key =
            std::string("base_model.model.model.layers.") + layer + ".mlp." + module + ".";
        tensors.emplace_back(key + "lora_A.weight", fill(name + key + "a", {4, in}, size));
        tensors.emplace_back(key + "lora_B.weight", fill(name + key + "b", {out, 4}, size));
      }
    }
    Tiny::write_adapter(
        directory,
        {{"peft_type", "LORA"}, {"r", 4}, {"lora_alpha", 8}, {"target_modules", modules}}, tensors);
    return directory;
  };
  static const std::string list = "[" + write("harms", {"up_proj", "down_proj"}, 0.6) + ", " +
                                  write("helps", {"gate_proj", "down_proj"}, 0.1) + "]";
  return list;
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
      {"xlora", "{adapters: " + tiny_loras() + "}"},
  };
  return fitted.contains(method) ? fitted.at(method) : "{}";
}

}  // namespace graft::peft
