// What an adapter directory is, who wrote it, and whether its numbers are sound; and, with its
// base, whether it fits it and does anything.
#pragma once

#include <string>
#include <vector>

#include "launcher/inspect.h"

namespace graft::launcher {

/// One adapter directory, looked at without its base. Unsound: tensors that are missing, not
/// finite or no floats, a type that no method here has, LoRA of which every product is zero.
/// @throws graft::Error (kData) for files that cannot be read
Inspection inspect_adapter(const std::string& directory);

/// Puts the adapters on a base, one on the other, and adds what came of it. Unsound: tensors that
/// do not fit, another fingerprint, logits that are not finite, and logits that are the base's.
void inspect_on_model(const std::vector<std::string>& directories, const std::string& model,
                      Inspection& inspection);

}  // namespace graft::launcher
