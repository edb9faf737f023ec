// PeftConfigReader: a foreign adapter_config.json, read entry by entry. What would change the
// mathematics and was not asked for is refused by name, so nothing is ever silently left out. Which
// modules are meant the tensors beside it say, so target_modules is not interpreted: in PEFT that
// is a list, a regular expression or a word, crossed with layer numbers and exclusions.
#pragma once

#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "configs/check.h"
#include "peft/adapter_file.h"
#include "peft/module_pattern.h"
#include "peft/targets.h"

namespace graft::peft {

class PeftConfigReader {
 public:
  explicit PeftConfigReader(const SavedAdapter& adapter);

  /// The entry, which may be anything; null if it is not there.
  const nlohmann::ordered_json& entry(const std::string& key);
  /// What Graft wrote beside the tensors; null if it is not there.
  nlohmann::ordered_json own_entry(const std::string& key) const {
    return adapter_.facts.value(key, nlohmann::json());
  }
  /// Sets `value` (bool, int, double or string) if the entry is there and not null.
  template <class T>
  void get(const std::string& key, T& value) {
    if (const auto& found = entry(key); !found.is_null()) read(key, found, value);
  }
  /// The modules that have a tensor of one of these leaves ("lora_A.weight"), as whole paths.
  void get_targets(const std::vector<std::string_view>& leaves, Targets& targets);
  /// The modules that target_modules and layers_to_transform name: for files whose tensors do not
  /// tell. @throws graft::Error (kData) for a regular expression
  void get_targets_by_name(Targets& targets);
  /// The modules whose own matrix is in the file: those of modules_to_save. After get_targets.
  std::vector<std::string> whole_modules();
  /// A pattern (rank_pattern, alpha_pattern) as the values of the target modules, by whole path.
  template <class T>
  void get_pattern(const std::string& key, const Targets& targets, std::map<std::string, T>& out);
  /// Entries without effect on what a saved adapter computes.
  void ignore(const std::vector<std::string>& keys);
  /// @throws graft::Error (kData) if an entry that was neither read nor ignored holds anything but
  /// null, false or {}
  void refuse_the_rest() const;

 private:
  using Json = nlohmann::ordered_json;
  static void read(const std::string& key, const Json& entry, bool& value);
  static void read(const std::string& key, const Json& entry, int& value);
  static void read(const std::string& key, const Json& entry, double& value);
  static void read(const std::string& key, const Json& entry, std::string& value);
  static void read(const std::string&, const Json& entry, Json& value) { value = entry; }

  const SavedAdapter& adapter_;
  std::set<std::string, std::less<>> used_;
  std::set<std::string, std::less<>> targets_;
};

template <class T>
void PeftConfigReader::get_pattern(const std::string& key, const Targets& targets,
                                   std::map<std::string, T>& out) {
  const Json& found = entry(key);
  if (found.is_null()) return;
  GRAFT_CHECK(found.is_object(), ExitCode::kData, "adapter_config.json: ", key, " is no object");
  std::vector<std::pair<ModulePattern, T>> pattern;
  size_t work = ModulePattern::kMostWork;
  for (const auto& [name, value] : found.items()) {
    pattern.emplace_back(ModulePattern(name), T());
    read(key + "." + name, value, pattern.back().second);
  }
  for (const std::string& module : targets.modules.values) {
    for (const auto& [name, value] : pattern) {
      if (name.matches(module, work)) {
        out[module] = value;
        break;
      }
    }
  }
}

/// A file from which all tensors of a module were lost is no smaller adapter: its config still
/// names the module.
/// @param is_adapted  by what was read from the directory
/// @throws graft::Error (kData) for a slot that a list of target_modules or modules_to_save names
/// and that is not; a regular expression names nothing
void check_named(const std::string& directory, const SlotMap& slots,
                 const std::function<bool(const LinearSite&)>& is_adapted);

}  // namespace graft::peft
