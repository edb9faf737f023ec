#include "peft/linear_method.h"

#include <xxhash.h>

namespace graft::peft {

void attach_linear(AttachContext& context, const LinearSite& site,
                   const std::shared_ptr<models::LinearAdapter>& adapter,
                   const std::vector<Leaf>& leaves) {
  site.slot->push(adapter);
  for (const auto& parameter : adapter->named_parameters()) {
    Param param{context.prefix + site.name + "." + parameter.key(), "", parameter.value(),
                site.stage};
    for (const auto& [ours, hf] : leaves) {
      if (ours == parameter.key()) {
        param.hf_key = "base_model.model." + site.hf_path + "." + std::string(hf);
      }
    }
    context.params.add(std::move(param));
  }
}

kernels::Key site_key(const AttachContext& context, const LinearSite& site) {
  return kernels::derive(context.random, XXH3_64bits(site.name.data(), site.name.size()));
}

}  // namespace graft::peft
