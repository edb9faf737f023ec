#include "peft/attach.h"

#include <xxhash.h>

#include <algorithm>
#include <optional>

#include "configs/check.h"

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

void thaw(AttachContext& context, const WeightSite& site) {
  site.weight->thaw(models::Thaw::kSteps);
  Param param;
  param.name = context.prefix + site.name;
  param.hf_key = site.hf_name;
  param.value = at::empty({0}, at::TensorOptions().dtype(at::kFloat).device(context.device));
  param.stage = site.stage, param.last_stage = site.last_stage;
  param.thawed = site.weight;
  context.params.add(std::move(param));
}

void check_slots(const AttachContext& context, size_t count, const char* kind) {
  GRAFT_CHECK(count > 0, "peft: ", context.method, " acts at ", kind, ", and this model (",
              context.info.family, ") has none");
}

std::string divisors_of(int64_t n) {
  std::vector<std::string> sizes;
  for (int64_t size = 2; size <= n; ++size) {
    if (n % size == 0) sizes.push_back(std::to_string(size));
  }
  return detail::concat("the divisors of ", n, ": ", configs::join(sizes, ", "));
}

void check_rank(const AttachContext& context, const LinearSite& site, int64_t rank) {
  const int64_t most = std::min(site.info.in, site.info.out);
  GRAFT_CHECK(context.from_file || rank <= most, "peft: ", site.name, " is ", site.info.out, " by ",
              site.info.in, ", so a rank of ", rank, " is more than it has: at most ", most);
}

kernels::Key site_key(const AttachContext& context, const std::string& slot) {
  return kernels::derive(context.random, XXH3_64bits(slot.data(), slot.size()));
}

}  // namespace graft::peft
