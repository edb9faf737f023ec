// Workbench: a loaded base with its adapters, ready to be trained, evaluated or asked. What every
// verb that runs a model starts from.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "dist/block_store.h"
#include "launcher/run.h"
#include "launcher/world.h"
#include "models/model.h"
#include "models/trunk.h"
#include "peft/peft.h"

namespace graft::launcher {

struct Workbench {
  World& world;
  at::ScalarType dtype;
  std::unique_ptr<models::Model> model;
  std::unique_ptr<dist::BlockStore> store;
  std::unique_ptr<dist::Comm>
      shard_comm;  ///< null: the world's; a group of one when the base is replicated
  std::unique_ptr<peft::Peft> adapters;
  std::unique_ptr<models::Trunk> trunk;
  std::string fingerprint;               ///< of the base
  std::vector<std::string> labels = {};  ///< of a classifier

  /// Dense copies of the base's weights, one at a time.
  std::unique_ptr<peft::BaseWeights> base_weights();
};

/// Puts model.adapters on the model, with their weights, and lets the active ones run.
void attach_frozen(peft::Peft& adapters, const ModelConfig& model);
/// One of them. They all run.
void attach_frozen(peft::Peft& adapters, const ModelConfig& model, size_t i);

/// Adds what --adapter says, "DIR" or "DIR=WEIGHT", to model.adapters; of methods that were trained
/// together each one.
void add_adapter(ModelConfig& model, const std::string& text);

/// Builds the model, attaches frozen adapters and the run's methods, loads the weights, sets
/// initial values. Mistakes in the run (targets, shapes) are reported before any weight is read.
/// Collective.
/// @param run     its `peft` entries are resolved (init_from alone gets its method)
/// @param resume  the checkpoint that will be loaded: its adapters say what the base holds; empty:
///                none
Workbench build_workbench(World& world, Run& run, const std::string& resume = "");

}  // namespace graft::launcher
