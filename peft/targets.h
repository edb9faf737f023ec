// Targets: what a user writes in `target_modules`, to linear slots. Means the same on every family.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "configs/schema.h"
#include "peft/slot_map.h"

namespace graft::peft {

struct AttachContext;  // peft/method.h

struct Targets {
  /// "all-linear" (every linear of the blocks), or any of: a role (attn.q), a slot
  /// (block.3.attn.q), a Hugging Face suffix (q_proj) or path (model.layers.3.self_attn.q_proj),
  /// each with * for any characters.
  configs::StringOrList modules = {"attn.q", "attn.v"};
  configs::StringOrList exclude = {};
  std::vector<int> layers = {};  ///< only these layers; empty: all
  bool gains = false;            ///< means vectors of norms (attn_norm), not matrices

  void fields(configs::Fields& f);
  /// The slots meant, in the model's order.
  /// @param field  what `modules` is called in messages
  /// @throws graft::Error (kUsage) for an entry that matches nothing, with the nearest names, and
  /// for a model without such slots
  std::vector<const LinearSite*> resolve(const AttachContext& context,
                                         const char* field = "target_modules") const;
  /// The same of a model that has some.
  std::vector<const LinearSite*> resolve(const SlotMap& slots,
                                         const char* field = "target_modules") const;
};

/// True if `text` fits `pattern`, where * stands for any characters.
bool glob_match(std::string_view pattern, std::string_view text);

/// What to write as PEFT's target_modules so that PEFT matches exactly these slots: suffixes where
/// every slot of that suffix is meant, whole paths otherwise.
std::vector<std::string> hf_targets(const std::vector<const LinearSite*>& sites,
                                    const SlotMap& slots);

/// True if an entry of target_modules or of a pattern means this slot.
bool is_meant(const std::string& entry, const LinearSite& site);

/// Throws for a key that means none of the adapted slots: a pattern that changes nothing is a
/// mistake.
void check_pattern(const std::vector<std::string>& keys,
                   const std::vector<const LinearSite*>& sites, const char* field);

/// The value that a pattern (rank_pattern, alpha_pattern) gives a slot, else `fallback`. The
/// longest key that means the slot wins, so a whole path beats a suffix.
template <class T>
T pattern_value(const std::map<std::string, T>& pattern, const LinearSite& site, T fallback) {
  const std::string* best = nullptr;
  for (const auto& [key, value] : pattern) {
    if (is_meant(key, site) && (best == nullptr || key.size() > best->size()))
      best = &key, fallback = value;
  }
  return fallback;
}

}  // namespace graft::peft
