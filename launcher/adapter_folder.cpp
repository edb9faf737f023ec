#include "launcher/adapter_folder.h"

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "configs/check.h"
#include "launcher/checkpoint/manifest.h"

namespace graft::launcher {

namespace fs = std::filesystem;

std::vector<std::string> adapter_parts(const std::string& directory) {
  const auto is_adapter = [](const std::string& path) { return fs::exists(path + kAdapterConfig); };
  if (is_adapter(directory)) return {directory};
  GRAFT_CHECK(!fs::is_regular_file(directory), ExitCode::kData, directory,
              ": a file; expected an adapter folder in PEFT's layout. One of LyCORIS's becomes a ",
              "folder by graft export --to peft");
  std::vector<std::string> parts;
  for (std::string part = directory + "/0"; is_adapter(part);
       part = directory + "/" + std::to_string(parts.size())) {
    parts.push_back(part);
  }
  const bool is_run = fs::exists(directory + "/adapter");
  GRAFT_CHECK(!parts.empty(), ExitCode::kData, directory,
              ": no adapter_config.json; expected an adapter folder in PEFT's layout",
              is_run ? ", as " + directory + "/adapter may be" : "");
  return parts;
}

AdapterChoice read_choice(const std::string& text) {
  const size_t equals = text.rfind('=');
  if (equals == std::string::npos || fs::exists(text)) return {text};
  const std::string number = text.substr(equals + 1);
  char* end = nullptr;
  const double weight = std::strtod(number.c_str(), &end);
  GRAFT_CHECK(!number.empty() && *end == 0 && std::isfinite(weight), "--adapter ", text, ": '",
              number, "' is no weight; expected DIR or DIR=WEIGHT");
  return {text.substr(0, equals), weight};
}

std::vector<std::string> attach_all(peft::Peft& adapters, const std::vector<std::string>& choices) {
  std::vector<std::string> all;
  for (const std::string& text : choices) {
    const auto [directory, weight] = read_choice(text);
    for (const std::string& part : adapter_parts(directory)) {
      adapters.attach_frozen(part, weight);
      all.push_back(part);
    }
  }
  return all;
}

void write_adapter_files(const std::string& folder, const peft::Peft::Saved& saved,
                         const models::io::SafetensorsMetadata& metadata) {
  fs::create_directories(folder);
  models::io::write_safetensors(folder + kAdapterWeights, saved.tensors, metadata);
  write_text(folder + kAdapterConfig, saved.config.dump(2) + "\n");
}

void check_unused(const std::string& verb, const std::string& output) {
  GRAFT_CHECK(!fs::exists(output), verb, ": ", output, " exists; nothing is overwritten");
}

}  // namespace graft::launcher
