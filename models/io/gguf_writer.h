// Writes GGUF files: metadata and unquantised tensors, which is what a LoRA export needs.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "models/io/gguf_header.h"

namespace graft::models::io {

/// Writes version 3, alignment 32, whole or not at all (see write_file). Metadata and tensors in
/// the order given.
/// @param tensors  float32, float16 or bfloat16, 1 to 4 dimensions, in torch order, from any device
/// @throws graft::Error for other dtypes, a name that is too long or given twice, or a path that
/// cannot be written
void write_gguf(const std::string& path,
                const std::vector<std::pair<std::string, GgufValue>>& metadata,
                const std::vector<std::pair<std::string, at::Tensor>>& tensors);

}  // namespace graft::models::io
