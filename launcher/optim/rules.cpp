#include "launcher/optim/rules.h"

#include "configs/check.h"

namespace graft::launcher {
namespace {

using Make = std::unique_ptr<StepRule> (*)(const peft::ParamSet&, const StepConfig&,
                                           StepRule::Memory);

template <class Rule>
std::unique_ptr<StepRule> make(const peft::ParamSet& params, const StepConfig& config,
                               StepRule::Memory memory) {
  return std::make_unique<Rule>(params, config, memory);
}

struct Entry {
  const char* name;
  Make make;
  StepRule::Memory memory;
};

constexpr Entry kRules[] = {
    {"adamw", make<AdamW>, StepRule::Memory::kDevice},
    {"adamw_8bit", make<AdamW8bit>, StepRule::Memory::kDevice},
    {"paged_adamw_32bit", make<AdamW>, StepRule::Memory::kHost},
    {"paged_adamw_8bit", make<AdamW8bit>, StepRule::Memory::kHost},
    {"sgd", make<Sgd>, StepRule::Memory::kDevice},
    {"lion", make<Lion>, StepRule::Memory::kDevice},
};

}  // namespace

std::unique_ptr<StepRule> make_step_rule(const std::string& name, const peft::ParamSet& params,
                                         const StepConfig& config) {
  for (const Entry& entry : kRules) {
    if (name == entry.name) return entry.make(params, config, entry.memory);
  }
  GRAFT_ASSERT(false, "no optimiser is called ", name);
}

}  // namespace graft::launcher
