// Learning-rate schedules as pure functions of the step, so resume has no schedule state. The rules
// and numbers are transformers' (optimization.py, 5.17).
#pragma once

#include <cstdint>
#include <string>

namespace graft::launcher {

struct Schedule {
  std::string type = "cosine";  ///< constant | linear | cosine | wsd
  double peak = 2e-4;
  int64_t max_steps = 1, warmup_steps = 0;

  /// @param step  from 0
  double operator()(int64_t step) const;
};

}  // namespace graft::launcher
