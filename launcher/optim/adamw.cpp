#include <ATen/ATen.h>

#include "configs/check.h"
#include "kernels/adamw/adamw.h"
#include "kernels/adamw8/adamw8.h"
#include "launcher/optim/rules.h"

namespace graft::launcher {
namespace {

constexpr int64_t kSmallestEightBit = 4096;  // elements

kernels::AdamWConfig adamw_config(const StepConfig& config, double learning_rate) {
  return {learning_rate, config.beta1, config.beta2, config.epsilon, config.weight_decay};
}

/// What a step with moments in float32 takes.
struct Dense {
  std::vector<Tensor> values, gradients, first, second;

  void step(int64_t number, const kernels::AdamWConfig& config) const {
    kernels::adamw(values, gradients, first, second, number, config);
  }
};

}  // namespace

AdamW::AdamW(const peft::ParamSet& params, const StepConfig& config, Memory memory)
    : StepRule(params, config, memory) {
  for (size_t i = 0; i < values().size(); ++i) keep(i, "exp_avg"), keep(i, "exp_avg_sq");
}

void AdamW::apply(std::span<const Update> updates, double learning_rate, int64_t step) {
  Dense dense;
  for (const Update& update : updates) {
    dense.values.push_back(update.value), dense.gradients.push_back(update.gradient);
    dense.first.push_back(update.state[0]), dense.second.push_back(update.state[1]);
  }
  dense.step(step, adamw_config(config(), learning_rate));
}

AdamW8bit::AdamW8bit(const peft::ParamSet& params, const StepConfig& config, Memory memory)
    : StepRule(params, config, memory) {
  for (size_t i = 0; i < values().size(); ++i) {
    GRAFT_CHECK(!params.all()[i].is_cut(), "train.optim: adamw_8bit has blocks of ",
                kernels::kAdamW8Block, " elements, and ", params.all()[i].name,
                " is cut over the ranks elsewhere: use adamw, or parallel.shard: replicate");
    const bool small = values()[i].numel() < kSmallestEightBit;
    for (const char* moment : {"exp_avg", "exp_avg_sq"}) {
      keep(i, moment, small ? at::kFloat : at::kByte);
      if (!small) keep(i, std::string(moment) + "_absmax", at::kFloat, kernels::kAdamW8Block);
    }
  }
}

void AdamW8bit::apply(std::span<const Update> updates, double learning_rate, int64_t step) {
  Dense dense;
  std::vector<Tensor> values, gradients;
  std::vector<kernels::EightBitMoment> first, second;
  for (const Update& update : updates) {
    const bool small = update.state.size() == 2;
    (small ? dense.values : values).push_back(update.value);
    (small ? dense.gradients : gradients).push_back(update.gradient);
    if (small) {
      dense.first.push_back(update.state[0]), dense.second.push_back(update.state[1]);
    } else {
      first.push_back({update.state[0], update.state[1]});
      second.push_back({update.state[2], update.state[3]});
    }
  }
  const kernels::AdamWConfig adamw = adamw_config(config(), learning_rate);
  dense.step(step, adamw);
  kernels::adamw_8bit(values, gradients, first, second, step, adamw);
}

}  // namespace graft::launcher
