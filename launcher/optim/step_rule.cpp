#include "launcher/optim/step_rule.h"

#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>

#include <utility>

namespace graft::launcher {
namespace {

constexpr int64_t kPagedBytes = 64 << 20;  // of state on the device at a time

}  // namespace

StepRule::StepRule(const peft::ParamSet& params, const StepConfig& config, Memory memory)
    : config_(config), memory_(memory), states_of_(params.all().size()) {
  for (const peft::Param& param : params.all()) {
    const double factor = param.learning_rate ? *param.learning_rate / config.learning_rate
                                              : param.learning_rate_factor;
    groups_[factor].push_back(values_.size());
    values_.push_back(param.value.detach());
  }
}

void StepRule::keep(size_t param, const std::string& name, at::ScalarType type, int64_t elements) {
  const Tensor& value = values_[param];
  const bool paged = memory_ == Memory::kHost && !value.is_cpu();
  auto options = value.options().dtype(type);
  if (paged) options = options.device(at::kCPU).pinned_memory(true);
  const auto sizes = elements == 1
                         ? value.sizes().vec()
                         : std::vector<int64_t>{(value.numel() + elements - 1) / elements};
  states_of_[param].push_back(states_.size());
  states_.push_back({name, param, at::zeros(sizes, options), elements});
}

void StepRule::step(const std::vector<Tensor>& gradients, double learning_rate) {
  ++num_steps_;
  for (const auto& [factor, members] : groups_) {
    std::vector<Update> updates;
    int64_t bytes = 0;
    for (const size_t i : members) {
      Update update{values_[i], gradients[i], {}};
      for (const size_t s : states_of_[i]) {
        update.state.push_back(states_[s].value);
        bytes += static_cast<int64_t>(states_[s].value.nbytes());
      }
      updates.push_back(std::move(update));
      if (memory_ == Memory::kDevice || bytes < kPagedBytes) continue;
      apply_paged(std::exchange(updates, {}), learning_rate * factor);
      bytes = 0;
    }
    apply_paged(std::move(updates), learning_rate * factor);
  }
}

/// Copies of pinned memory and the step are in the order of one stream: nothing waits here.
void StepRule::apply_paged(std::vector<Update> updates, double learning_rate) {
  std::vector<std::pair<Tensor, Tensor>> pages;  // on the host, on the device
  for (Update& update : updates) {
    for (Tensor& state : update.state) {
      if (state.device() == update.value.device()) continue;
      pages.emplace_back(state, state.to(update.value.device(), /*non_blocking=*/true));
      state = pages.back().second;
    }
  }
  apply(updates, learning_rate, num_steps_);
  for (const auto& [host, device] : pages) host.copy_(device, /*non_blocking=*/true);
}

const std::vector<StepRule::State>& StepRule::states() const {
  if (memory_ == Memory::kHost && !values_.empty() && !values_[0].is_cpu())
    at::accelerator::synchronizeDevice(values_[0].device().index());  // pages on their way back
  return states_;
}

int64_t StepRule::state_bytes() const {
  int64_t bytes = 0;
  for (const State& state : states_) bytes += static_cast<int64_t>(state.value.nbytes());
  return bytes;
}

}  // namespace graft::launcher
