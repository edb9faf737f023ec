// Rows of tokens that another method trains beside its own
// (methods/selective/trainable_tokens.cpp).
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "peft/adapter_file.h"
#include "peft/method.h"

namespace graft::peft {

/// trainable_tokens on the embedding, under the keys of PEFT's trainable_token_indices.
std::unique_ptr<Method> make_token_rows(const std::vector<int>& tokens);

/// The entry trainable_token_indices of a config as PEFT wants it: null where there are none.
nlohmann::json with_token_rows(nlohmann::json config);
/// A config in which PEFT names the embedding, {"embed_tokens": [...]}, with the list alone.
SavedAdapter of_token_rows(SavedAdapter adapter);

}  // namespace graft::peft
