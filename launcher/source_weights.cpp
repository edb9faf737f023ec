#include "launcher/source_weights.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "models/base.h"
#include "models/io/open_source.h"
#include "models/load.h"

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

std::unique_ptr<models::Model> UnloadedBase::make_model() const {
  return models::make_model(models::read_base_config(path_));
}

SourceWeights& UnloadedBase::open(models::Model& model) {
  source_ = models::io::open_source(path_);
  matched_ = models::match_weights(model, *source_);
  return weights_.emplace(matched_, *source_, model.info().head_dim);
}

std::string UnloadedBase::fingerprint() const { return models::fingerprint(*source_, matched_); }

}  // namespace graft::launcher
