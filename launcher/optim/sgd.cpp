#include <ATen/ATen.h>

#include "launcher/optim/rules.h"

namespace graft::launcher {

Sgd::Sgd(const peft::ParamSet& params, const StepConfig& config, Memory memory)
    : StepRule(params, config, memory) {}

void Sgd::apply(std::span<const Update> updates, double learning_rate, int64_t) {
  for (const Update& update : updates) {
    Tensor value = update.value;
    value.sub_(update.gradient.add(value, config().weight_decay), learning_rate);
  }
}

}  // namespace graft::launcher
