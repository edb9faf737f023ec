// The folder of an adapter as verbs see it: its parts, and a new one that is there whole or not at
// all.
#pragma once

#include <string>
#include <vector>

#include "models/io/safetensors.h"
#include "peft/peft.h"

namespace graft::launcher {

constexpr const char* kAdapterConfig = "/adapter_config.json";
constexpr const char* kAdapterWeights = "/adapter_model.safetensors";

/// The folders of an adapter: itself, or its numbered parts.
/// @throws graft::Error (kData) if there is no adapter_config.json
std::vector<std::string> adapter_parts(const std::string& directory);

/// An adapter as verbs take it, and how much of it counts.
struct AdapterChoice {
  std::string directory;
  double weight = 1;
};
/// @param text  DIR or DIR=WEIGHT
AdapterChoice read_choice(const std::string& text);

/// Freezes all parts of these on a model, in their order. @return the parts
std::vector<std::string> attach_all(peft::Peft& adapters, const std::vector<std::string>& choices);

/// Puts the two files of an adapter into a folder that is there.
void write_adapter_files(const std::string& folder, const peft::Peft::Saved& saved,
                         const models::io::SafetensorsMetadata& metadata);

/// Refuses a folder, or file, that is there. @param verb  who asks: "export"
void check_unused(const std::string& verb, const std::string& output);

}  // namespace graft::launcher
