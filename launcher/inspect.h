// Inspecting: what a file or folder of ours, or one that we read, holds, and whether it is sound.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "launcher/facts.h"

namespace graft::launcher {

struct Inspection {
  Facts facts;
  bool sound = true;  ///< false: a checkpoint or adapter that must not be used; facts say why
};

/// @param path   adapter, checkpoint or model folder; token shard, GGUF or safetensors file
/// @param model  the base that an adapter's or checkpoint's is loaded onto, in NF4; empty: none
/// @throws graft::Error (kData) for a damaged file, and for one of no known kind
Inspection inspect(const std::string& path, const std::string& model = "");

/// Counts by dtype, and elements, of a list of tensors (SourceTensor or SafetensorsEntry).
template <class List>
void add_tensor_facts(const List& tensors, Facts& facts) {
  std::map<std::string, int64_t> by_dtype;
  int64_t elements = 0;
  for (const auto& t : tensors) {
    ++by_dtype[t.dtype];
    int64_t n = 1;
    for (const int64_t size : t.shape) n *= size;
    elements += n;
  }
  facts["tensors"] = by_dtype;
  facts["parameters"] = elements;
}

}  // namespace graft::launcher
