#include "peft/peft_config.h"

#include <algorithm>
#include <limits>

namespace graft::peft {
namespace {

constexpr std::string_view kWeight = ".weight";

void expect(bool holds, const std::string& key, const nlohmann::ordered_json& entry,
            const char* expected) {
  GRAFT_CHECK(holds, ExitCode::kData, "adapter_config.json: ", key, " = ", entry.dump(),
              ", expected ", expected);
}

/// "model.layers.0.self_attn.q_proj" of "base_model.model.model.layers.0.self_attn.q_proj.<leaf>",
/// else "".
std::string_view module_of(std::string_view tensor, std::string_view leaf) {
  if (!tensor.starts_with(kFilePrefix) || !tensor.ends_with(leaf)) return "";
  tensor.remove_prefix(kFilePrefix.size());
  if (tensor.size() < leaf.size() + 2 || tensor[tensor.size() - leaf.size() - 1] != '.') return "";
  return tensor.substr(0, tensor.size() - leaf.size() - 1);
}

/// True if an entry of a list is the module's path or an end of it, as PEFT compares them.
bool lists(const nlohmann::ordered_json& names, const std::string& path) {
  return names.is_array() && std::any_of(names.begin(), names.end(), [&](const auto& name) {
           const std::string text = name.is_string() ? name.template get<std::string>() : "";
           return path == text || path.ends_with("." + text);
         });
}

}  // namespace

PeftConfigReader::PeftConfigReader(const SavedAdapter& adapter) : adapter_(adapter) {
  ignore({"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode",
          "peft_version", "auto_mapping", "modules_to_save"});  // of these the tensors say more
}

const nlohmann::ordered_json& PeftConfigReader::entry(const std::string& key) {
  static const nlohmann::ordered_json null;
  used_.insert(key);
  const auto it = adapter_.config.find(key);
  return it == adapter_.config.end() ? null : *it;
}

void PeftConfigReader::get_targets(const std::vector<std::string_view>& leaves, Targets& targets) {
  ignore({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"});
  const std::set<std::string_view> tensors(adapter_.tensors.begin(), adapter_.tensors.end());
  for (const std::string& tensor : adapter_.tensors) {
    for (const std::string_view leaf : leaves) {
      const std::string_view module = module_of(tensor, leaf);
      if (module.empty()) continue;
      // A module whose own matrix is there is whole, and a leaf "bias" is a part of it.
      const std::string own = std::string(kFilePrefix).append(module).append(kWeight);
      if (!tensors.contains(own)) targets_.emplace(module);
    }
  }
  GRAFT_CHECK(!targets_.empty(), ExitCode::kData, "adapter_model.safetensors: no tensor is called ",
              kFilePrefix, "<module>.", leaves.front(), "; the adapter holds nothing");
  targets.modules = {}, targets.exclude = {}, targets.layers = {};
  targets.modules.values = {targets_.begin(), targets_.end()};
}

void PeftConfigReader::get_targets_by_name(Targets& targets) {
  const Json& names = entry("target_modules");
  const bool is_word = names == "all-linear";
  expect(is_word || names.is_array(), "target_modules", names, "a list, or \"all-linear\"");
  targets.modules = {}, targets.exclude = {}, targets.layers = {};
  for (const Json& name : is_word ? Json::array({names}) : names) {
    expect(name.is_string(), "target_modules", name, "a string");
    targets.modules.values.push_back(name);
  }
  const Json& layers = entry("layers_to_transform");
  for (const Json& layer : layers.is_number() ? Json::array({layers}) : layers)
    read("layers_to_transform", layer, targets.layers.emplace_back());
  const Json& pattern = entry("layers_pattern");  // the blocks are model.layers here
  const bool is_theirs = pattern.is_null() || pattern == "layers" || pattern == Json::array() ||
                         pattern == Json::array({"layers"});
  expect(is_theirs, "layers_pattern", pattern, "null or \"layers\"");
}

std::vector<std::string> PeftConfigReader::whole_modules() {
  std::vector<std::string> modules;
  for (const std::string& tensor : adapter_.tensors) {
    const std::string_view module = module_of(tensor, kWeight.substr(1));
    if (module.empty() || tensor.ends_with(kBaseCopy)) continue;
    if (module_around(module, targets_).empty()) modules.emplace_back(module);
  }
  return modules;
}

void PeftConfigReader::ignore(const std::vector<std::string>& keys) {
  used_.insert(keys.begin(), keys.end());
}

void PeftConfigReader::refuse_the_rest() const {
  for (const auto& [key, value] : adapter_.config.items()) {
    const bool off = value.is_null() || value == false || (value.is_object() && value.empty()) ||
                     (value.is_array() && value.empty());
    GRAFT_CHECK(off || used_.contains(key), ExitCode::kData, "adapter_config.json: ", key, " = ",
                value.dump(), " changes what the adapter computes and is not supported");
  }
}

void PeftConfigReader::read(const std::string& key, const Json& entry, bool& value) {
  expect(entry.is_boolean(), key, entry, "true or false");
  value = entry.get<bool>();
}

void PeftConfigReader::read(const std::string& key, const Json& entry, int& value) {
  const bool fits =
      entry.is_number_unsigned()
          ? entry.get<uint64_t>() <= std::numeric_limits<int>::max()
          : entry.is_number_integer() && entry.get<int64_t>() >= std::numeric_limits<int>::min();
  expect(fits, key, entry, "an integer of 32 bits");
  value = entry.get<int>();
}

void PeftConfigReader::read(const std::string& key, const Json& entry, double& value) {
  expect(entry.is_number(), key, entry, "a number");
  value = entry.get<double>();
}

void PeftConfigReader::read(const std::string& key, const Json& entry, std::string& value) {
  expect(entry.is_string(), key, entry, "a string");
  value = entry.get<std::string>();
}

void check_named(const std::string& directory, const SlotMap& slots,
                 const std::function<bool(const LinearSite&)>& is_adapted) {
  const auto config = read_saved_adapter(directory).config;
  const auto entry = [&](const char* key) { return config.value(key, nlohmann::ordered_json()); };
  const auto targets = entry("target_modules"), excluded = entry("exclude_modules");
  const auto whole = entry("modules_to_save"), layers = entry("layers_to_transform");
  const auto is_target = [&](const LinearSite& site) {
    if (excluded.is_string() || !entry("layers_pattern").is_null())
      return false;  // of another kind
    const bool layer_fits =
        layers.is_null() || std::any_of(layers.begin(), layers.end(),
                                        [&](const auto& layer) { return layer == site.layer; });
    return layer_fits && lists(targets, site.hf_path) && !lists(excluded, site.hf_path);
  };
  for (const auto* sites : {&slots.linears, &slots.gains}) {
    for (const LinearSite& site : *sites) {
      const bool is_whole = lists(whole, site.hf_path);
      GRAFT_CHECK((!is_whole && !is_target(site)) || is_adapted(site), ExitCode::kData, directory,
                  "/adapter_config.json: ", is_whole ? "modules_to_save" : "target_modules",
                  " names ", site.hf_path, ", and adapter_model.safetensors has no tensor ",
                  kFilePrefix, site.hf_path, ".*");
    }
  }
}

}  // namespace graft::peft
