#include "peft/peft_config.h"

namespace graft::peft {
namespace {

void read_names(const nlohmann::json& config, const char* key, configs::StringOrList& names) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return;
  if (it->is_string()) {
    const auto text = it->get<std::string>();
    GRAFT_CHECK(text.find_first_of("\\^$|()[]+?") == std::string::npos, ExitCode::kData,
                "adapter_config.json: ", key, " = '", text,
                "' is a regular expression; list the modules instead");
    names = text.c_str();
    return;
  }
  GRAFT_CHECK(it->is_array(), ExitCode::kData, "adapter_config.json: ", key,
              " is neither a string nor a list");
  names.values.clear();
  names.is_single = false;
  for (const auto& name : *it) {
    GRAFT_CHECK(name.is_string(), ExitCode::kData, "adapter_config.json: ", key, " holds ",
                name.dump());
    names.values.push_back(name.get<std::string>());
  }
}

}  // namespace

PeftConfigReader::PeftConfigReader(const nlohmann::json& config) : config_(config) {
  ignore({"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode",
          "peft_version", "auto_mapping"});
}

void PeftConfigReader::get_targets(Targets& targets) {
  read_names(config_, "target_modules", targets.modules);
  read_names(config_, "exclude_modules", targets.exclude);
  used_.insert({"target_modules", "exclude_modules", "layers_to_transform"});
  const auto layers = config_.find("layers_to_transform");
  if (layers == config_.end() || layers->is_null()) return;
  if (layers->is_number_integer()) {
    targets.layers = {layers->get<int>()};
  } else {
    get("layers_to_transform", targets.layers);
  }
}

void PeftConfigReader::ignore(std::initializer_list<std::string_view> keys) {
  used_.insert(keys.begin(), keys.end());
}

void PeftConfigReader::refuse_the_rest() const {
  for (const auto& [key, value] : config_.items()) {
    const bool off = value.is_null() || value == false || (value.is_object() && value.empty()) ||
                     (value.is_array() && value.empty());
    GRAFT_CHECK(off || used_.contains(key), ExitCode::kData, "adapter_config.json: ", key, " = ",
                value.dump(), " changes what the adapter computes and is not supported");
  }
}

}  // namespace graft::peft
