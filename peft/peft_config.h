// PeftConfigReader: a foreign adapter_config.json, read entry by entry. What would change the
// mathematics and was not asked for is refused by name, so nothing is ever silently left out.
#pragma once

#include <initializer_list>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "configs/check.h"
#include "peft/targets.h"

namespace graft::peft {

class PeftConfigReader {
 public:
  explicit PeftConfigReader(const nlohmann::json& config);

  /// Sets `value` if the entry is there and not null.
  template <class T>
  void get(const std::string& key, T& value) {
    used_.insert(key);
    const auto it = config_.find(key);
    if (it == config_.end() || it->is_null()) return;
    try {
      value = it->get<T>();
    } catch (const nlohmann::json::exception&) {
      throw Error(ExitCode::kData,
                  "adapter_config.json: " + key + " = " + it->dump() + " has the wrong type");
    }
  }
  /// target_modules, exclude_modules and layers_to_transform. Regular expressions are refused.
  void get_targets(Targets& targets);
  /// Entries without effect on what a saved adapter computes.
  void ignore(std::initializer_list<std::string_view> keys);
  /// @throws graft::Error (kData) if an entry that was neither read nor ignored holds anything but
  /// null, false or {}
  void refuse_the_rest() const;

 private:
  const nlohmann::json& config_;
  std::set<std::string, std::less<>> used_;
};

}  // namespace graft::peft
