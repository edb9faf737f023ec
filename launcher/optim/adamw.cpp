#include "launcher/optim/adamw.h"

#include <ATen/ATen.h>

namespace graft::launcher {

AdamW::AdamW(const peft::ParamSet& params, double weight_decay) : weight_decay_(weight_decay) {
  for (const peft::Param& param : params.all()) {
    groups_[param.learning_rate_factor].push_back(values_.size());
    values_.push_back(param.value.detach());
    m_.push_back(at::zeros_like(values_.back()));
    v_.push_back(at::zeros_like(values_.back()));
  }
}

void AdamW::step(const std::vector<Tensor>& gradients, double learning_rate) {
  ++num_steps_;
  for (const auto& [factor, members] : groups_) {
    const auto pick = [&, &group = members](const std::vector<Tensor>& all) {
      std::vector<Tensor> picked;
      picked.reserve(group.size());
      for (const size_t i : group) picked.push_back(all[i]);
      return picked;
    };
    kernels::AdamWConfig config;
    config.learning_rate = learning_rate * factor;
    config.weight_decay = weight_decay_;
    kernels::adamw(pick(values_), pick(gradients), pick(m_), pick(v_), num_steps_, config);
  }
}

}  // namespace graft::launcher
