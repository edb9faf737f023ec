#include "launcher/source_weights.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "configs/check.h"

namespace graft::launcher {

at::Tensor SourceWeights::weight(const peft::LinearSite& site) {
  const auto named = [&](const std::string& name) {
    return std::find_if(weights_.begin(), weights_.end(),
                        [&](const auto& weight) { return weight.name == name; });
  };
  const auto own = named(site.name + ".weight");  // a tied head has none
  const auto found = own == weights_.end() ? named("embed.weight") : own;
  return source_.read(found->source->name).to(at::kFloat);
}

at::Tensor SourceWeights::bias(const peft::LinearSite& site) { GRAFT_ASSERT(false, site.name); }

}  // namespace graft::launcher
