#include "peft/attach.h"

#include <xxhash.h>

#include <optional>

namespace graft::peft {

void attach_linear(AttachContext& context, const LinearSite& site,
                   const std::shared_ptr<models::LinearAdapter>& adapter,
                   const std::vector<Leaf>& leaves, const LearningRateFactor& factor) {
  site.slot->push(adapter);
  list_tensors(context, *adapter, {site.name, "base_model.model." + site.hf_path, site.stage},
               leaves, factor);
}

void list_tensors(AttachContext& context, const torch::nn::Module& module, const TensorPlace& place,
                  const std::vector<Leaf>& leaves, const LearningRateFactor& factor) {
  const auto leaf_of = [&](const std::string& name) -> std::optional<std::string> {
    for (const auto& [ours, hf] : leaves) {
      if (ours == name) return std::string(hf);
    }
    return std::nullopt;
  };
  const std::string name = context.prefix + place.name + ".";
  const std::string key = place.key + ".";
  for (const auto& parameter : module.named_parameters()) {
    Param param;
    param.name = name + parameter.key();
    param.hf_key = key + leaf_of(parameter.key()).value_or(parameter.key());
    param.value = parameter.value();
    param.stage = param.last_stage = place.stage;
    if (factor) param.learning_rate_factor = factor(parameter.key());
    context.params.add(std::move(param));
  }
  for (const auto& buffer : module.named_buffers()) {
    if (const auto leaf = leaf_of(buffer.key()))
      context.params.add(Constant{name + buffer.key(), key + *leaf, buffer.value()});
  }
}

kernels::Key site_key(const AttachContext& context, const std::string& slot) {
  return kernels::derive(context.random, XXH3_64bits(slot.data(), slot.size()));
}

}  // namespace graft::peft
