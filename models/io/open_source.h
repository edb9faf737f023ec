// The one place that turns a path into a TensorSource.
#pragma once

#include <memory>
#include <string>

#include "models/io/source.h"

namespace graft::models::io {

/// @param path  a Hugging Face folder, a .safetensors file or a .gguf file
/// @throws graft::Error (kData) that says what was found and what is expected; never reads pickle
/// files (.bin, .pt)
std::unique_ptr<TensorSource> open_source(const std::string& path);

/// Whether there are weights that open_source would look at: a folder may hold only a config.
bool has_safetensors(const std::string& folder);

}  // namespace graft::models::io
