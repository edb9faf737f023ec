// Gradients: the launcher's GradientSink. Sums each parameter's gradients over the lanes of a step
// and over ranks, as a fixed tree (the same bits at any world size) or as running sums (the
// fastest), and divides by the global number of target tokens: never a mean of means. The gradients
// of thawed weights leave for the ranks that own them when their stage is done, always by the tree,
// so no rank holds those of more than one stage.
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
  /// @param comm       of all ranks; needed where weights are thawed. All lanes of a step are then
  ///                   one sweep
  Gradients(const peft::ParamSet& params, int num_stages, int64_t num_lanes, Reduction reduction,
            dist::Comm* comm = nullptr);

  const std::vector<Tensor>& parameters(int stage) const override;
  void add(int stage, const models::Lane& lane, std::vector<Tensor> gradients) override;
  void stage_done(int stage) override;

  /// Ends a step: sums over ranks, divides. Afterwards flat() and of() hold the step's gradients.
  /// Collective.
  void reduce(dist::Comm& comm, double num_targets);

  /// After reduce() each parameter's grad() is its part of flat(): methods may change it.
  /// Those of replicated parameters, float32, one after the other; parts of it are of().
  Tensor& flat() { return flat_; }
  /// In the order of the ParamSet; of a thawed weight those of its master's elements.
  const std::vector<Tensor>& of() const { return views_; }
  /// Of all ranks' gradients; the same bits on each rank, at any world size. Collective.
  double norm() const;
  void scale(double factor);
  /// Parameter and element of the first one that is not finite, of what this rank holds; or "".
  std::string first_non_finite() const;

 private:
  /// Thawed weights at one of the stages that use them.
  struct Thawed {
    std::vector<size_t> indexes;  ///< in the ParamSet
    std::vector<bool> first;      ///< the stage is the first one on the way down that uses it
    std::vector<std::vector<dist::Slice>> slices;  ///< of the row of their gradients, by rank
    dist::TreeSum tree;
  };
  struct Stage {
    std::vector<Tensor> parameters;  ///< `num_own` that end here on the way down, then guests,
                                     ///< then the leaves of thawed weights
    size_t num_own = 0;
    int64_t numel = 0;            ///< of its own
    std::vector<size_t> indexes;  ///< of `parameters` but the leaves in the ParamSet
    dist::TreeSum tree;
    Tensor sum;
    Thawed thawed;
  };
  void add_thawed(const peft::Param& param, size_t index);

  int64_t num_lanes_;
  Reduction reduction_;
  dist::Comm* comm_;
  std::vector<Stage> stages_;
  std::vector<std::pair<std::string, int64_t>>
      begins_;  ///< name and begin in flat, in the order of flat
  /// Of a parameter used by several stages, what those above its lowest gave, by lane and index.
  std::map<std::pair<int64_t, size_t>, Tensor> pending_;
  Tensor flat_;
  std::vector<Tensor> views_;
  std::vector<std::pair<std::string, dist::CutVector>> thawed_;  ///< name and gradient
};

}  // namespace graft::launcher
