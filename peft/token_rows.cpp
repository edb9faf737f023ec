#include "peft/token_rows.h"

namespace graft::peft {

constexpr const char* kEntry = "trainable_token_indices";

nlohmann::json with_token_rows(nlohmann::json config) {
  if (config[kEntry].empty()) config[kEntry] = nullptr;  // PEFT takes [] for some
  return config;
}

SavedAdapter of_token_rows(SavedAdapter adapter) {
  auto& tokens = adapter.config[kEntry];
  if (tokens.is_object() && tokens.size() == 1 && tokens.contains("embed_tokens")) {
    const auto list = tokens.at("embed_tokens");
    tokens = list;
  }
  return adapter;
}

}  // namespace graft::peft
