// StepRule: how an optimiser moves the parameters. A rule says what it keeps of a tensor and how a
// list of tensors takes a step; groups of one learning rate, the state's names in checkpoints and
// its place in memory are the same for all.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "peft/param_set.h"

namespace graft::launcher {

using at::Tensor;

struct StepConfig {
  double weight_decay = 0;
  double beta1 = 0.9, beta2 = 0.999;
  double epsilon = 1e-8;
  double learning_rate = 1;  ///< of the run, where it is highest
};

class StepRule {
 public:
  enum class Memory {
    kDevice,
    kHost,  ///< paged: in the host's memory, and on the device while a parameter takes its step
  };
  using State = peft::ParamState;

  virtual ~StepRule() = default;

  /// @param gradients  one a parameter, in the ParamSet's order
  void step(const std::vector<Tensor>& gradients, double learning_rate);

  /// Ready to be read and written.
  const std::vector<State>& states() const;
  int64_t state_bytes() const;
  int64_t num_steps() const { return num_steps_; }
  void set_num_steps(int64_t n) { num_steps_ = n; }

 protected:
  /// A parameter at its step; `state` as the rule has listed it.
  struct Update {
    Tensor value, gradient;
    std::vector<Tensor> state;
  };

  StepRule(const peft::ParamSet& params, const StepConfig& config, Memory memory);
  /// Adds zeros to the state of a parameter, one element for each `elements` of it.
  void keep(size_t param, const std::string& name, at::ScalarType type = at::kFloat,
            int64_t elements = 1);
  /// @param step  number of this step, from 1
  virtual void apply(std::span<const Update> updates, double learning_rate, int64_t step) = 0;

  const std::vector<Tensor>& values() const { return values_; }
  const StepConfig& config() const { return config_; }

 private:
  void apply_paged(std::vector<Update> updates, double learning_rate);

  StepConfig config_;
  Memory memory_;
  std::vector<Tensor> values_;
  std::map<double, std::vector<size_t>> groups_;  ///< by their learning rate over the run's
  std::vector<State> states_;
  std::vector<std::vector<size_t>> states_of_;  ///< of a parameter
  int64_t num_steps_ = 0;
};

}  // namespace graft::launcher
