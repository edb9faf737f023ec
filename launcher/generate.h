// Text generation with a key/value cache, greedy or sampled.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "launcher/workbench.h"

namespace graft::launcher {

struct GenerateOptions {
  int64_t max_new_tokens = 128;
  double temperature = 0;  ///< 0, or too small to divide by: the likeliest token
  uint64_t seed = 42;
  int64_t prompt_number = 0;  ///< equal prompts with different numbers are sampled apart
  std::vector<int64_t> eos_ids;
};

/// Continues `prompt`. Every rank computes the same tokens. Collective.
/// @param on_token  told each new token's id as it comes
/// @return the new tokens, without the end token
std::vector<int64_t> generate(Workbench& bench, const std::vector<int64_t>& prompt,
                              const GenerateOptions& options,
                              const std::function<void(int64_t)>& on_token);

}  // namespace graft::launcher
