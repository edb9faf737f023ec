// Conversion: what adapters of any mergeable type, or a stack of them, do to the matrices, as one
// LoRA.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "peft/peft.h"

namespace graft::launcher {

/// B [out, r] and A [r, in] with B A near a matrix, float64.
struct LowRank {
  at::Tensor b, a;
  int64_t exact = 0;  ///< the matrix's own rank
  double lost = 0;    ///< |D - B A|^2 / |D|^2
};

/// The best approximation of a rank, from the singular values.
/// @param change  D [out, in], float64
/// @param rank    at most; 0: D's own, whose B A is D up to rounding. A zero matrix has rank 1
LowRank factorised(const at::Tensor& change, int64_t rank);

/// What became of the changes.
struct LoraReport {
  int64_t num_matrices = 0, smallest_rank = 0, largest_rank = 0;
  double lost = 0;        ///< share of the energy of all changes
  double most_lost = 0;   ///< of one matrix's
  std::string lost_most;  ///< that matrix
};

struct LoraConversion {
  std::unique_ptr<models::Model> model;  ///< that `adapters` are on
  std::unique_ptr<peft::Peft> adapters;  ///< the one LoRA
  LoraReport report;
};

/// One LoRA with these factors and a scale of one.
std::unique_ptr<peft::Peft> lora_of(models::Model& model,
                                    const std::map<const peft::LinearSite*, LowRank>& factors);

/// @param stack  adapters on the base, innermost first, with their values
/// @param rank   of every matrix's LoRA; 0: as many as its change has, so that nothing is lost
/// @throws graft::Error (kUsage) for adapters that are not changes of matrices alone, and, without
/// a rank, for changes that no LoRA smaller than the matrices holds
LoraConversion as_lora(const peft::Peft& stack, peft::BaseWeights& base,
                       std::unique_ptr<models::Model> model, int64_t rank);

/// The linears and gains that have adapters. @throws graft::Error (kUsage) if an adapter acts
/// elsewhere, or is not a change of its matrix alone
/// @param others  adapters to pass over
std::vector<const peft::LinearSite*> changed_matrices(
    const peft::SlotMap& slots, const std::string& verb,
    const std::set<const models::LinearAdapter*>& others = {});

}  // namespace graft::launcher
