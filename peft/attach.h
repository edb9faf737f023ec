// How a method puts an adapter on a linear slot: its tensors are listed under the keys they have in
// PEFT's files.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "peft/method.h"

namespace graft::peft {

/// Our name of a parameter or buffer and what follows the module's path in PEFT's file.
using Leaf = std::pair<std::string_view, std::string_view>;

/// Of a parameter, by our name; none: 1 for all.
using LearningRateFactor = std::function<double(std::string_view)>;

/// Puts an adapter on a slot and lists its parameters, and those of its buffers that `leaves` name:
/// constants that are saved. A parameter that `leaves` do not name keeps its own name in the file.
void attach_linear(AttachContext& context, const LinearSite& site,
                   const std::shared_ptr<models::LinearAdapter>& adapter,
                   const std::vector<Leaf>& leaves, const LearningRateFactor& factor = {});

/// Where the tensors of a module are listed.
struct TensorPlace {
  std::string name;  ///< of the slot: "block.3.attn"
  std::string key;   ///< what precedes their names in files: "base_model.model.model.layers.3"
  int stage;
};

/// Lists a module's parameters, and those of its buffers that `leaves` name.
void list_tensors(AttachContext& context, const torch::nn::Module& module, const TensorPlace& place,
                  const std::vector<Leaf>& leaves, const LearningRateFactor& factor = {});

/// Trains a tensor of the base itself, unquantised and cut over the ranks as its block is (storage
/// class S). In files it has Hugging Face's name.
void thaw(AttachContext& context, const WeightSite& site);

/// @throws graft::Error (kUsage) unless the model has `count` > 0 of the slots that the method acts
/// at
/// @param kind  what they are called in the message: "linear layers"
void check_slots(const AttachContext& context, size_t count, const char* kind);

/// "the divisors of 12: 2, 3, 4, 6, 12": the sizes above 1 that cut `n`
std::string divisors_of(int64_t n);

/// @throws graft::Error for a rank that is more than the matrix can have
void check_rank(const AttachContext& context, const LinearSite& site, int64_t rank);

/// The key of a slot's initial values.
kernels::Key site_key(const AttachContext& context, const std::string& slot);
inline kernels::Key site_key(const AttachContext& context, const LinearSite& site) {
  return site_key(context, site.name);
}

}  // namespace graft::peft
