// Rotary position embedding: the inverse frequencies of every scaling rule, and the tables of a
// lane. Source: Su et al. 2021, arXiv:2104.09864; the scaling rules as transformers 5 computes them
// (modeling_rope_utils).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace graft::models {

using at::Tensor;

struct RopeConfig {
  double theta = 10000;
  std::string type = "default";  ///< default | linear | dynamic | llama3 | yarn | longrope
  double factor = 1;
  int64_t original_length = 0;  ///< context before scaling (llama3, yarn, longrope)
  double low_freq_factor = 1, high_freq_factor = 4;            ///< llama3
  double beta_fast = 32, beta_slow = 1, attention_factor = 0;  ///< yarn (0: computed), longrope
  double mscale = 0, mscale_all_dim = 0;                       ///< yarn, DeepSeek's variant
  bool truncate = true;                                        ///< yarn
  std::vector<double> short_factor, long_factor;               ///< longrope
};

/// One inverse frequency a pair, float32 [K/2], and the factor on cos and sin.
/// @param head_dim    K
/// @param max_length  the model's max_position_embeddings
/// @param length      longest position used + 1 (dynamic and longrope look at it)
std::pair<std::vector<float>, float> inverse_frequencies(const RopeConfig& config, int64_t head_dim,
                                                         int64_t max_length, int64_t length);

/// cos and sin [B, L, K] float32 of positions_BL, the angles written twice: element i turns with
/// element i + K/2.
std::pair<Tensor, Tensor> rope_tables(const RopeConfig& config, int64_t head_dim,
                                      int64_t max_length, const Tensor& positions_BL);

}  // namespace graft::models
