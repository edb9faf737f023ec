// Peft's frozen adapters: which of them run, as what, and over which methods they can stand.
#include <ATen/ATen.h>

#include <algorithm>
#include <type_traits>

#include "configs/check.h"
#include "peft/adapter_file.h"
#include "peft/low_rank_stack.h"
#include "peft/peft.h"

namespace graft::peft {

void Peft::activate(const std::vector<std::string>& names) {
  GRAFT_ASSERT(trained_.empty(), "what is trained was attached to the adapters that were active");
  std::vector<std::string> known;
  for (Frozen& frozen : frozen_) {
    if (frozen.is_expert) continue;
    known.push_back(frozen.name);
    frozen.is_active = std::find(names.begin(), names.end(), frozen.name) != names.end();
  }
  for (const std::string& name : names) {
    GRAFT_CHECK(std::find(known.begin(), known.end(), name) != known.end(),
                "no adapter is called '", name, "'; there are: ", configs::join(known, ", "));
  }
  run_active();
}

/// Once a method. All of a run are attached before its first method is: they lie below.
const std::vector<size_t>& Peft::attach_experts(const Method& method) {
  const auto [found, is_new] = experts_.try_emplace(&method);
  if (!is_new) return found->second;
  for (const std::string& directory : method.experts()) {
    attach_frozen(directory);
    for (const Param& param : frozen_.back().params.all()) {
      GRAFT_CHECK(param.thawed == nullptr, ExitCode::kData, directory, ": holds ", param.hf_key,
                  ", a tensor of the base itself (bias, modules_to_save): it cannot be mixed");
    }
    frozen_.back().is_active = false;
    frozen_.back().is_expert = true;
    found->second.push_back(frozen_.size() - 1);
  }
  if (!found->second.empty()) run_active();
  return found->second;
}

/// Each slot runs the active ones of the adapters that were frozen in it, low-rank products as one.
void Peft::run_active() {
  slots_.each([&](const auto& site) {
    using Adapter = typename std::decay_t<decltype(site.slot->adapters())>::value_type;
    constexpr bool kIsLinear = std::is_same_v<Adapter, std::shared_ptr<models::LinearAdapter>>;
    std::vector<std::conditional_t<kIsLinear, Weighted, Adapter>> active;
    for (const auto& [owner, adapter] : site.slot->frozen()) {
      const Frozen& frozen = frozen_[owner];
      if (!frozen.is_active) continue;
      if constexpr (kIsLinear) {
        active.push_back({adapter, frozen.weight});
      } else {
        GRAFT_CHECK(frozen.weight == 1, frozen.name, ": a weight of ", frozen.weight, " for ",
                    frozen.method_name, " at ", site.name,
                    ": only what adds a low-rank product to a matrix can have a weight");
        active.push_back(adapter);
      }
    }
    if constexpr (kIsLinear) {
      site.slot->run_frozen(fuse(active));
    } else {
      site.slot->run_frozen(std::move(active));
    }
  });
}

std::string Peft::frozen_hash() const {
  std::string all;
  for (const Frozen& frozen : frozen_) all += frozen.params.hash();
  return all;
}

/// Methods that need a layer's matrix stand on methods that can be merged into it.
/// @param method  attached just now
void Peft::check_composes(const std::string& method) {
  for (const auto* sites : {&slots_.linears, &slots_.gains}) {
    for (const LinearSite& site : *sites) {
      const models::LinearAdapter* unmergeable = nullptr;
      for (size_t i = 0; i < site.slot->size(); ++i) {
        const auto& adapter = site.slot->adapters()[i];
        const bool is_new = i >= site.slot->num_frozen() && !method_of_.contains(adapter.get());
        if (is_new) method_of_[adapter.get()] = method;
        GRAFT_CHECK(!is_new || !adapter->needs_weight() || unmergeable == nullptr, "peft: ", method,
                    " needs the matrix of ", site.name, ", and ", method_of_[unmergeable],
                    " below it cannot be merged into one; put it on other modules, or above");
        if (!adapter->mergeable()) unmergeable = adapter.get();
      }
    }
  }
}

std::map<std::string, std::function<Tensor()>> Peft::replaced_weights() const {
  std::map<std::string, std::function<Tensor()>> replaced;
  for (const Frozen& frozen : frozen_) {
    for (const Param& param : frozen.params.all()) {
      for (const WeightSite& site : slots_.weights) {
        if (site.weight != param.thawed) continue;
        replaced[site.name] = [directory = frozen.directory, key = param.hf_key] {
          return AdapterFile(directory).tensor(key);
        };
      }
    }
  }
  return replaced;
}

}  // namespace graft::peft
