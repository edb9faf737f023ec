// Rows of tokens that another method trains beside its own
// (methods/selective/trainable_tokens.cpp).
#pragma once

#include <memory>
#include <vector>

#include "peft/method.h"

namespace graft::peft {

/// trainable_tokens on the embedding, under the keys of PEFT's trainable_token_indices.
std::unique_ptr<Method> make_token_rows(const std::vector<int>& tokens);

}  // namespace graft::peft
