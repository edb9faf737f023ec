#include "peft/param_set.h"

#include <xxhash.h>

#include <limits>

#include "configs/check.h"

namespace graft::peft {

void ParamSet::add(Param param) {
  GRAFT_ASSERT(names_.insert(param.name).second, "two parameters named ", param.name);
  GRAFT_ASSERT(param.value.scalar_type() == at::kFloat && param.value.is_leaf(), param.name);
  GRAFT_ASSERT(param.stage <= param.last_stage, param.name);
  param.value.set_requires_grad(true);
  params_.push_back(std::move(param));
}

void ParamSet::add(Constant constant) {
  GRAFT_ASSERT(names_.insert(constant.name).second, "two tensors named ", constant.name);
  constants_.push_back(std::move(constant));
}

int64_t ParamSet::numel() const {
  int64_t n = 0;
  for (const Param& p : params_) n += p.value.numel();
  return n;
}

int ParamSet::lowest_stage() const {
  int lowest = std::numeric_limits<int>::max();
  for (const Param& p : params_) lowest = std::min(lowest, p.stage);
  return lowest;
}

std::string ParamSet::hash() const {
  XXH3_state_t* state = XXH3_createState();
  XXH3_128bits_reset(state);
  for (const Param& p : params_) {
    const Tensor bytes = p.value.detach().cpu().contiguous();
    XXH3_128bits_update(state, p.name.data(), p.name.size());
    XXH3_128bits_update(state, bytes.const_data_ptr(), bytes.nbytes());
  }
  const XXH128_hash_t h = XXH3_128bits_digest(state);
  XXH3_freeState(state);
  return detail::concat(std::hex, h.high64, "-", h.low64);
}

}  // namespace graft::peft
