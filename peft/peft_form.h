// PeftForm: how a method of HF PEFT's is written and read without code of its own. The fields of
// its config have PEFT's names, so they are the entries of adapter_config.json; what else PEFT
// writes there is listed.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "configs/schema.h"
#include "peft/attach.h"
#include "peft/targets.h"
#include "peft/whole_tensors.h"

namespace graft::peft {

/// What write_peft_form leaves to be written where PEFT does not look.
inline constexpr const char* kOwnEntries = "graft";

struct PeftForm {
  std::string type = {};  ///< "LOHA"; empty: PEFT has no such method, and only Graft reads the file
  std::string bias_only = {};  ///< PEFT's word for the biases of adapted matrices: "lora_only"
  /// Entries that have one value here: written, and refused when a file says otherwise.
  nlohmann::json fixed = nlohmann::json::object();
  /// Entries that do not change what a saved adapter computes.
  std::vector<std::string> inert = {};
  /// Fields that PEFT does not know: they stand beside the tensors, in the file's metadata.
  std::vector<std::string> ours = {};
};

/// Throws for a key of a map from slots (rank_pattern) that means none of the adapted ones.
void check_patterns(const configs::FieldDoc& fields, const std::vector<const LinearSite*>& sites);

/// The entries of the fields, maps from slots apart, and the fixed ones.
nlohmann::json write_peft_entries(const PeftForm& form, const configs::FieldDoc& fields);

/// Sets the fields from a config whose other entries the caller has read; the rest is refused.
/// @param targets  whose slots maps are over; null: no field is a map
void read_peft_entries(const PeftForm& form, PeftConfigReader& config, const Targets* targets,
                       const std::function<void(configs::Fields&)>& fields);

/// The method's own entries: its fields, a map from slots (rank_pattern) by whole module path.
nlohmann::json write_peft_form(const PeftForm& form, const configs::FieldDoc& fields,
                               const std::vector<const LinearSite*>& sites,
                               const WholeTensors& whole, const SlotMap& slots);

/// Sets the fields, the targets (the modules that have one of the leaves) and the whole tensors.
/// @throws graft::Error (kData) for a value that the field refuses and for entries that would
/// change what the adapter computes and are not known
void read_peft_form(const PeftForm& form, const SavedAdapter& adapter,
                    const std::vector<Leaf>& leaves, Targets& targets, WholeTensors& whole,
                    const std::function<void(configs::Fields&)>& fields);

}  // namespace graft::peft
