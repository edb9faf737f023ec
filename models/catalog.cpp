// The manifest models.def, and how a config finds its family.
#include <sstream>

#include "configs/check.h"
#include "configs/names.h"
#include "models/base.h"

namespace graft::models {

#define MODEL(folder, types, summary) \
  std::unique_ptr<Model> make_##folder(const nlohmann::json& config);
#include "models/models.def"
#undef MODEL

namespace {

std::vector<std::string> words(const char* text) {
  std::istringstream in(text);
  std::vector<std::string> out;
  for (std::string word; in >> word;) out.push_back(word);
  return out;
}

}  // namespace

const std::vector<FamilyFacts>& families() {
  static const std::vector<FamilyFacts> facts = {
#define MODEL(folder, types, summary) FamilyFacts{#folder, words(types), summary},
#include "models/models.def"
#undef MODEL
  };
  return facts;
}

std::string model_type_of(const nlohmann::json& config) {
  const auto type = config.find("model_type");
  if (type == config.end()) return "";
  GRAFT_CHECK(type->is_string(), ExitCode::kData, "model config: model_type = ", type->dump(),
              ", expected a string");
  return type->get<std::string>();
}

std::unique_ptr<Model> make_model(const nlohmann::json& config) {
  using Make = std::unique_ptr<Model> (*)(const nlohmann::json&);
  static const std::vector<Make> makers = {
#define MODEL(folder, types, summary) make_##folder,
#include "models/models.def"
#undef MODEL
  };
  const std::string type = model_type_of(config);
  std::vector<std::string> known;
  for (size_t i = 0; i < makers.size(); ++i) {
    for (const std::string& name : families()[i].model_types) {
      if (name == type) return makers[i](config);
      known.push_back(name);
    }
  }
  throw Error(ExitCode::kData, "model config: model_type '" + type +
                                   "' is not supported; known: " + configs::join(known, ", "));
}

}  // namespace graft::models
