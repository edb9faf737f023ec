#include "launcher/source_weights.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace graft::launcher {

at::Tensor SourceWeights::weight(const peft::LinearSite& site) {
  const auto* own = find(site.name + ".weight");  // a tied head has none
  return read(*(own == nullptr ? find("embed.weight") : own)).to(at::kFloat);
}

at::Tensor SourceWeights::bias(const peft::LinearSite& site) {
  return read(*find(site.name + ".bias")).to(at::kFloat);
}

at::Tensor SourceWeights::read(const models::MatchedWeight& weight) {
  const at::Tensor stored = source_.read(weight.source->name);
  return weight.transform == models::Transform::kIdentity
             ? stored
             : models::rope_rows_from_gguf(stored, head_dim_);
}

const models::MatchedWeight* SourceWeights::find(const std::string& name) const {
  const auto found = std::find_if(weights_.begin(), weights_.end(),
                                  [&](const auto& weight) { return weight.name == name; });
  return found == weights_.end() ? nullptr : &*found;
}

}  // namespace graft::launcher
