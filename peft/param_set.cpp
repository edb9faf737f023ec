#include "peft/param_set.h"

#include <xxhash.h>

#include <algorithm>
#include <limits>

#include "configs/check.h"

namespace graft::peft {

Tensor Param::saved() const {
  return tail.defined() ? at::cat({value.detach(), tail}, tail_dim) : value.detach();
}

void Param::set(const Tensor& saved) const {
  const at::NoGradGuard no_grad;
  if (!tail.defined()) {
    Tensor(value).copy_(saved);
    return;
  }
  const int64_t own = value.size(tail_dim);
  Tensor(value).copy_(saved.narrow(tail_dim, 0, own));
  Tensor(tail).copy_(saved.narrow(tail_dim, own, tail.size(tail_dim)));
}

void ParamSet::add(Param param) {
  GRAFT_ASSERT(names_.insert(param.name).second, "two parameters named ", param.name);
  GRAFT_ASSERT(param.stage <= param.last_stage, param.name);
  if (param.thawed == nullptr) {
    GRAFT_ASSERT(param.value.scalar_type() == at::kFloat && param.value.is_leaf(), param.name);
    param.value.set_requires_grad(true);
  }
  params_.push_back(std::move(param));
}

void ParamSet::add(Constant constant) {
  GRAFT_ASSERT(names_.insert(constant.name).second, "two tensors named ", constant.name);
  constants_.push_back(std::move(constant));
}

void ParamSet::set_tail(const std::string& name, Tensor tail, int64_t dim) {
  Param& param = named(name);
  param.tail = std::move(tail);
  param.tail_dim = dim;
}

void ParamSet::set_learning_rate(const std::string& name, double rate) {
  named(name).learning_rate = rate;
}

Param& ParamSet::named(const std::string& name) {
  const auto param =
      std::find_if(params_.begin(), params_.end(), [&](const Param& p) { return p.name == name; });
  GRAFT_ASSERT(param != params_.end(), "no parameter named ", name);
  return *param;
}

int64_t ParamSet::numel() const {
  int64_t n = 0;
  for (const Param& p : params_) n += p.numel();
  return n;
}

bool ParamSet::has_thawed() const {
  return std::any_of(params_.begin(), params_.end(), [](auto& p) { return p.thawed != nullptr; });
}

void ParamSet::bind_thawed() {
  for (Param& p : params_) {
    if (p.thawed != nullptr && p.thawed->is_loaded()) p.value = p.thawed->master();
  }
}

void ParamSet::publish_thawed() {
  for (const Param& p : params_) {
    if (p.thawed != nullptr) p.thawed->publish();
  }
}

int ParamSet::lowest_stage() const {
  int lowest = std::numeric_limits<int>::max();
  for (const Param& p : params_) lowest = std::min(lowest, p.stage);
  return lowest;
}

std::string ParamSet::hash() const { return hash(true); }
std::string ParamSet::replicated_hash() const { return hash(false); }

std::string ParamSet::hash(bool with_thawed) const {
  XXH3_state_t* state = XXH3_createState();
  XXH3_128bits_reset(state);
  for (const Param& p : params_) {
    if (p.thawed != nullptr && !with_thawed) continue;
    const Tensor bytes = p.value.detach().cpu().contiguous();
    XXH3_128bits_update(state, p.name.data(), p.name.size());
    XXH3_128bits_update(state, bytes.const_data_ptr(), bytes.nbytes());
  }
  const XXH128_hash_t h = XXH3_128bits_digest(state);
  XXH3_freeState(state);
  return detail::concat(std::hex, h.high64, "-", h.low64);
}

}  // namespace graft::peft
