// A base model by name: what its files say it is, the Model for it, and where its weights come
// from.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "models/io/source.h"
#include "models/model.h"

namespace graft::models {

/// What a base's files say, in the field names of Hugging Face's config.json: a folder's
/// config.json, a GGUF file's metadata, or a shape file (configs/models/X.yaml). As in
/// transformers, a folder whose head is there and differs from the embedding is not tied, whatever
/// its config says: tie_word_embeddings is then false.
/// @throws graft::Error (kData) naming the file; of a GGUF file also the hyperparameter that would
/// change what the model computes and is not known here
nlohmann::json read_base_config(const std::string& path);

/// A config's model_type, empty if it has none. @throws graft::Error (kData) if it is not a string
std::string model_type_of(const nlohmann::json& config);

/// The model of a config's model_type, without weights.
/// @throws graft::Error (kData) for a model_type that no family has, with the list
std::unique_ptr<Model> make_model(const nlohmann::json& config);

/// Weights drawn at random, normal with deviation 0.02, norms one: for benchmarks and tests without
/// files. A pure function of (seed, name, element).
std::unique_ptr<io::TensorSource> random_source(Model& model, uint64_t seed);

/// Makes a causal LM's config one of a classifier with the same blocks; that of a classifier must
/// be for the same.
/// @throws graft::Error (kUsage) if it is a classifier for another task or number of labels
void make_classifier(nlohmann::json& config, Task task, int64_t num_labels);

/// The weights of a base for a model of its config. A classifier's head that the files do not have
/// is drawn: N(0, initializer_range^2), its bias zero, a pure function of (seed, name, element).
std::unique_ptr<io::TensorSource> open_base(const std::string& path, Model& model, uint64_t seed);

struct FamilyFacts {
  std::string name;
  std::vector<std::string> model_types;
  std::string summary;
};
/// The families of models.def.
const std::vector<FamilyFacts>& families();

}  // namespace graft::models
