// GGUF's block formats to float32, bit for bit what PyPI gguf's quants.dequantize gives. Plain
// loops, no LibTorch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "models/io/gguf_header.h"

namespace graft::models::io {

/// @param type    any GgmlType
/// @param blocks  num_blocks blocks as they lie in the file
/// @param values  [num_blocks * block_elems] float32
void dequantize_ggml(GgmlType type, const std::byte* blocks, int64_t num_blocks, float* values);

}  // namespace graft::models::io
