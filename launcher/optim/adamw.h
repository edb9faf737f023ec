// AdamW over a ParamSet: the moments, by parameter, and one step.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "kernels/adamw/adamw.h"
#include "peft/param_set.h"

namespace graft::launcher {

using at::Tensor;

class AdamW {
 public:
  AdamW(const peft::ParamSet& params, double weight_decay);
  /// @param gradients  one a parameter, in the ParamSet's order
  void step(const std::vector<Tensor>& gradients, double learning_rate);

  std::vector<Tensor>& first_moments() { return m_; }
  std::vector<Tensor>& second_moments() { return v_; }
  int64_t num_steps() const { return num_steps_; }
  void set_num_steps(int64_t n) { num_steps_ = n; }

 private:
  std::vector<Tensor> values_, m_, v_;
  std::map<double, std::vector<size_t>> groups_;  ///< by learning-rate factor
  double weight_decay_;
  int64_t num_steps_ = 0;
};

}  // namespace graft::launcher
