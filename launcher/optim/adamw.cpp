#include "launcher/optim/adamw.h"

#include <ATen/ATen.h>

namespace graft::launcher {

AdamW::AdamW(const peft::ParamSet& params, double weight_decay) : weight_decay_(weight_decay) {
  for (const peft::Param& param : params.all()) {
    values_.push_back(param.value.detach());
    m_.push_back(at::zeros_like(values_.back()));
    v_.push_back(at::zeros_like(values_.back()));
  }
}

void AdamW::step(const std::vector<Tensor>& gradients, double learning_rate) {
  kernels::AdamWConfig config;
  config.learning_rate = learning_rate;
  config.weight_decay = weight_decay_;
  kernels::adamw(values_, gradients, m_, v_, ++num_steps_, config);
}

}  // namespace graft::launcher
