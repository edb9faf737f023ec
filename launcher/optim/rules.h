// The optimisers: a class a file, and the names a run knows them by (Hugging Face's).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "launcher/optim/names.h"
#include "launcher/optim/step_rule.h"

namespace graft::launcher {

/// AdamW in float32. Loshchilov and Hutter 2019, arXiv:1711.05101.
class AdamW : public StepRule {
 public:
  explicit AdamW(const peft::ParamSet& params, const StepConfig& config = {},
                 Memory memory = Memory::kDevice);

 private:
  void apply(std::span<const Update> updates, double learning_rate, int64_t step) override;
};

/// AdamW with moments in 8 bits; those of tensors below 4096 elements stay float32, as in
/// bitsandbytes. Dettmers et al. 2022, arXiv:2110.02861.
class AdamW8bit : public StepRule {
 public:
  explicit AdamW8bit(const peft::ParamSet& params, const StepConfig& config = {},
                     Memory memory = Memory::kDevice);

 private:
  void apply(std::span<const Update> updates, double learning_rate, int64_t step) override;
};

/// p -= lr (g + wd p): torch.optim.SGD without momentum, and so without state.
class Sgd : public StepRule {
 public:
  explicit Sgd(const peft::ParamSet& params, const StepConfig& config = {},
               Memory memory = Memory::kDevice);

 private:
  void apply(std::span<const Update> updates, double learning_rate, int64_t step) override;
};

/// p -= lr (sign(beta1 m + (1 - beta1) g) + wd p), then m = beta2 m + (1 - beta2) g.
/// Chen et al. 2023, arXiv:2302.06675, algorithm 2; its betas are 0.9 and 0.99.
class Lion : public StepRule {
 public:
  explicit Lion(const peft::ParamSet& params, const StepConfig& config = {},
                Memory memory = Memory::kDevice);

 private:
  void apply(std::span<const Update> updates, double learning_rate, int64_t step) override;
};

/// @param name  of step_rule_names()
std::unique_ptr<StepRule> make_step_rule(const std::string& name, const peft::ParamSet& params,
                                         const StepConfig& config);

}  // namespace graft::launcher
