// Gradients: the launcher's GradientSink. Sums each parameter's gradients over the lanes of a step
// and over ranks, as a fixed tree (the same bits at any world size) or as running sums (the
// fastest), and divides by the global number of target tokens: never a mean of means.
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "dist/comm.h"
#include "dist/tree_reduce.h"
#include "models/trunk.h"
#include "peft/param_set.h"

namespace graft::launcher {

using at::Tensor;

enum class Reduction { kTree, kFastest };

class Gradients : public models::GradientSink {
 public:
  /// @param num_lanes  of a step, over all ranks
  Gradients(const peft::ParamSet& params, int num_stages, int64_t num_lanes, Reduction reduction);

  const std::vector<Tensor>& parameters(int stage) const override;
  void add(int stage, const models::Lane& lane, std::vector<Tensor> gradients) override;
  void stage_done(int /*stage*/) override {}

  /// Ends a step: sums over ranks, divides. Afterwards flat() and of() hold the step's gradients.
  /// Collective.
  void reduce(dist::Comm& comm, double num_targets);

  /// After reduce() each parameter's grad() is its part of flat(): methods may change it.
  /// All gradients, float32, one after the other; parts of it are of().
  Tensor& flat() { return flat_; }
  /// In the order of the ParamSet.
  const std::vector<Tensor>& of() const { return views_; }
  /// Parameter and element of an index into flat().
  std::string where(int64_t index) const;

 private:
  struct Stage {
    std::vector<Tensor> parameters;  ///< `num_own` that end here on the way down, then guests
    size_t num_own = 0;
    int64_t numel = 0;            ///< of its own
    std::vector<size_t> indexes;  ///< of `parameters` in the ParamSet
    dist::TreeSum tree;
    Tensor sum;
  };
  int64_t num_lanes_;
  Reduction reduction_;
  std::vector<Stage> stages_;
  std::vector<std::pair<std::string, int64_t>>
      begins_;  ///< name and begin in flat, in the order of flat
  /// Of a parameter used by several stages, what those above its lowest gave, by lane and index.
  std::map<std::pair<int64_t, size_t>, Tensor> pending_;
  Tensor flat_;
  std::vector<Tensor> views_;
};

}  // namespace graft::launcher
