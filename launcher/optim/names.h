// What train.optim may be: Hugging Face's names. Apart from the rules, so that a configuration is
// read without LibTorch.
#pragma once

#include <string>
#include <vector>

namespace graft::launcher {

/// make_step_rule (rules.h) knows them all.
inline std::vector<std::string> step_rule_names() {
  return {"adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "sgd", "lion"};
}

}  // namespace graft::launcher
