// Inspecting: what a file or folder of ours, or one that we read, holds, and whether it is sound.
#pragma once

#include <string>

#include "launcher/facts.h"

namespace graft::launcher {

struct Inspection {
  Facts facts;
  bool sound = true;  ///< false: a checkpoint or adapter that must not be used; facts say why
};

/// @param path  adapter, checkpoint or model folder; token shard, GGUF or safetensors file
/// @throws graft::Error (kData) for a damaged file, and for one of no known kind
Inspection inspect(const std::string& path);

}  // namespace graft::launcher
