// Exporting an adapter for other programs: a clean PEFT folder, one safetensors file, llama.cpp's
// GGUF adapter, or LyCORIS's file; and the last of these read, into folders.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "launcher/as_lora.h"

namespace graft::launcher {

struct ExportOptions {
  /// Folders; several only where they become one LoRA. With to = peft also one file of LyCORIS's.
  std::vector<std::string> adapters;
  std::string
      model;  ///< its base; needed for gguf, lycoris and `as`, otherwise only held against it
  std::string output;  ///< must not exist
  std::string to;      ///< peft | safetensors | gguf | lycoris
  std::string as;  ///< lora: adapters of any mergeable type, or a stack, as one LoRA; empty: as is
  int64_t rank = 0;       ///< of that LoRA; 0: as many as the changes have
  bool any_base = false;  ///< the adapter may have been trained on a base with another fingerprint
};

/// peft: adapter_config.json and adapter_model.safetensors with nothing in them that is ours alone.
/// Copies of base matrices, which PEFT keeps beside an adapted embedding or head, are dropped where
/// a model is given and they are its own; without one they stay. safetensors: PEFT's keys, the
/// config as text in the metadata entry `adapter_config`. gguf: llama.cpp's LoRA adapter, float32.
/// One alpha for the file: rsLoRA and other alphas of single layers go into B.
/// lycoris: see peft/lycoris_file.h. A file of LyCORIS's that holds several kinds of adapters, or
/// one in several settings, becomes numbered folders; those whose formula PEFT has are PEFT's.
/// @return what came of a conversion; nothing without one
/// @throws graft::Error: kUsage for what the format cannot hold; kData for files that do not
/// fit, and for copies of another base's matrices
std::optional<LoraReport> export_adapter(const ExportOptions& options);

}  // namespace graft::launcher
