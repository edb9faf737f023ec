#include <ATen/ATen.h>

#include "launcher/optim/rules.h"

namespace graft::launcher {

Lion::Lion(const peft::ParamSet& params, const StepConfig& config, Memory memory)
    : StepRule(params, config, memory) {
  for (size_t i = 0; i < values().size(); ++i) keep(i, "exp_avg");
}

void Lion::apply(std::span<const Update> updates, double learning_rate, int64_t) {
  const auto& [weight_decay, beta1, beta2, epsilon, peak] = config();
  for (const Update& update : updates) {
    Tensor value = update.value, m = update.state[0];
    const Tensor& g = update.gradient;
    value.mul_(1 - learning_rate * weight_decay)
        .sub_((m * beta1).add_(g, 1 - beta1).sign_(), learning_rate);
    m.mul_(beta2).add_(g, 1 - beta2);
  }
}

}  // namespace graft::launcher
