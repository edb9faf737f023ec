// Peft's adapters beside one another: which of the frozen ones run and as what, and which methods
// can stand on which.
#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <set>
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
      bool can_have_weight = false;
      if constexpr (kIsLinear) can_have_weight = adapter->low_rank().has_value();
      GRAFT_CHECK(frozen.weight == 1 || can_have_weight, frozen.name, ": a weight of ",
                  frozen.weight, " for ", frozen.method_name, " at ", site.name,
                  ": only what adds a low-rank product and nothing else can have one (LoRA without "
                  "a bias, that took nothing from the base)");
      if constexpr (kIsLinear) {
        active.push_back({adapter, frozen.weight});
      } else {
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

/// Whose the adapter at a place of a slot is, for messages.
template <class Site>
std::string Peft::owner(const Site& site, size_t place) const {
  const auto found = method_of_.find(site.slot->adapters()[place].get());
  if (found != method_of_.end()) return found->second;
  std::vector<std::string> names;  // several frozen ones that run as one product
  for (const auto& frozen : site.slot->frozen()) {
    const std::string& name = method_of_.at(frozen.adapter.get());
    if (frozen_[frozen.owner].is_active) names.push_back(name);
  }
  return configs::join(names, " and ");
}

/// Methods that need a layer's matrix stand on methods that can be merged into it.
/// @param method  attached just now
void Peft::check_composes(const std::string& method) {
  std::set<const void*> is_new;
  slots_.each([&](const auto& site) {
    for (size_t i = site.slot->num_frozen(); i < site.slot->size(); ++i) {
      const void* adapter = site.slot->adapters()[i].get();
      if (method_of_.emplace(adapter, method).second) is_new.insert(adapter);
    }
  });
  for (const auto* sites : {&slots_.linears, &slots_.gains}) {
    for (const LinearSite& site : *sites) {
      std::optional<size_t> unmergeable;
      for (size_t i = 0; i < site.slot->size(); ++i) {
        const auto& adapter = site.slot->adapters()[i];
        GRAFT_CHECK(!is_new.contains(adapter.get()) || !adapter->needs_weight() || !unmergeable,
                    "peft: ", method, " needs the matrix of ", site.name, ", and ",
                    owner(site, *unmergeable),
                    " below it cannot be merged into one; put it on other modules, or above");
        if (!adapter->mergeable()) unmergeable = i;
      }
    }
  }
}

/// Below an adapter that replaces what it wraps another would be dead, and nobody would know.
/// @param checked  how many of a slot's were looked at before
void Peft::check_replaces(const std::map<const LinearSite*, size_t>& checked) const {
  for (const auto* sites : {&slots_.linears, &slots_.gains}) {
    for (const LinearSite& site : *sites) {
      const auto found = checked.find(&site);
      const size_t first = found == checked.end() ? 0 : found->second;
      for (size_t i = std::max<size_t>(first, 1); i < site.slot->size(); ++i) {
        GRAFT_CHECK(!site.slot->adapters()[i]->replaces(), "peft: ", owner(site, i),
                    " takes the place of ", site.name, ", and ", owner(site, i - 1),
                    " below it would do nothing there; leave ", site.name,
                    " out of one of them, or put the one that takes its place first");
      }
    }
  }
}

/// @param params  of a method attached just now
void Peft::note_thawed(const std::vector<Param>& params, const std::string& method) {
  for (const Param& param : params) {
    if (param.thawed == nullptr) continue;
    const auto [found, is_first] = thawed_by_.emplace(param.thawed, method);
    GRAFT_CHECK(is_first, "peft: ", param.hf_key, " is thawed by two methods, ", found->second,
                " and ", method, "; one of them is enough");
  }
}

/// An adapter that computes with the matrix would take it for a constant.
void Peft::check_thawed_alone() const {
  for (const WeightSite& weight : slots_.weights) {
    if (!weight.weight->is_trained()) continue;
    for (const auto* sites : {&slots_.linears, &slots_.gains}) {
      for (const LinearSite& site : *sites) {
        const bool shares_table = site.name == "head" && model_.info().tied_head;
        const std::string table = shares_table ? "embed" : site.name;
        GRAFT_CHECK(site.slot->empty() || !weight.name.starts_with(table + "."),
                    "peft: ", weight.name, " is trained whole, and ", site.name,
                    " has an adapter too: of ", thawed_by_.at(weight.weight), " and ",
                    owner(site, site.slot->size() - 1), "; leave it out of one of them");
      }
    }
  }
}

std::vector<std::string> Peft::prompts() const {
  std::vector<std::string> names;
  for (const auto& site : slots_.sequences) {
    for (size_t i = 0; i < (site.name == "input" ? site.slot->size() : 0); ++i)
      names.push_back(owner(site, i));
  }
  return names;
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
