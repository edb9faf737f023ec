// Exporting an adapter for other programs: a clean PEFT folder, one safetensors file, or
// llama.cpp's GGUF adapter.
#pragma once

#include <string>

namespace graft::launcher {

struct ExportOptions {
  std::string adapter;  ///< adapter folder
  std::string model;   ///< its base; needed for gguf, otherwise the adapter is only held against it
  std::string output;  ///< must not exist
  std::string to;      ///< peft | safetensors | gguf
};

/// peft: adapter_config.json and adapter_model.safetensors with nothing in them that is ours alone.
/// Copies of base matrices, which PEFT keeps beside an adapted embedding or head, are dropped where
/// a model is given and they are its own; without one they stay. safetensors: PEFT's keys, the
/// config as text in the metadata entry `adapter_config`. gguf: llama.cpp's LoRA adapter, float32.
/// One alpha for the file: rsLoRA and other alphas of single layers go into B.
/// @throws graft::Error: kUsage for what the format cannot hold; kData for files that do not
/// fit, and for copies of another base's matrices
void export_adapter(const ExportOptions& options);

}  // namespace graft::launcher
