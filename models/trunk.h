// Trunk: the explicit loop over stages, stages outside and lanes inside, so that one gather of a
// block serves every micro-batch of a sweep, up and down. No autograd graph crosses a stage; the
// only place that pins blocks. Where an adapter looks(), the base without adapters goes up first
// and leaves its last hidden state: one more gather of each block, half of a step's work more (a
// third if stages are run again on the way down). The schedule is known on paper as layered
// gradient accumulation (arXiv:2106.02679).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "dist/block_store.h"
#include "models/model.h"

namespace graft::models {

/// Where the trunk hands over each stage's gradients of each lane. Lanes come in increasing order
/// within a stage.
class GradientSink {
 public:
  virtual ~GradientSink() = default;
  /// The trainable tensors that stage `i` uses, in a fixed order.
  virtual const std::vector<Tensor>& parameters(int stage) const = 0;
  /// One gradient a parameter; undefined means zero.
  virtual void add(int stage, const Lane& lane, std::vector<Tensor> gradients) = 0;
  /// All lanes of the stage were added.
  virtual void stage_done(int stage) = 0;
};

enum class Recompute {
  kOff,  ///< keep each stage's graph until its gradients are pulled
  kOn,   ///< keep each stage's input only, run it again on the way down
};

struct TrunkOptions {
  Recompute recompute = Recompute::kOff;
  bool training = true;    ///< dropout and its like
  kernels::Key random{};   ///< of (seed, step); each lane derives its own
  int lowest_trained = 0;  ///< nothing is computed or gathered below it on the way down
};

class Trunk {
 public:
  /// Both outlive the trunk.
  /// @param prefetch_blocks  0: a stage's blocks are gathered when it begins; 1: while the one
  ///                         before it runs
  Trunk(Model& model, dist::BlockStore& store, int prefetch_blocks = 1);

  /// Forward and backward of all lanes: each lane's loss_sum is set, its gradients go to the sink.
  /// Lanes without a token compute nothing but take part in every gather.
  void sweep(std::span<Lane> lanes, GradientSink& sink, const TrunkOptions& options);

  /// Forward only. @return the last stage's output for each lane; undefined for a lane without
  /// tokens.
  /// @param pass  everything but lane, stage and batch, which the trunk fills in; a cache serves
  /// one lane only
  std::vector<Tensor> forward(std::span<const Lane> lanes, const Pass& pass);

  /// Where values stop being finite on the way up, for a report of what went wrong. Collective.
  struct NonFinite {
    int stage = -1;     ///< -1: nowhere
    std::string where;  ///< "the weight block.3.mlp.up.weight", else "the output of block.3"
  };
  NonFinite first_non_finite(std::span<const Lane> lanes, const TrunkOptions& options);

 private:
  class StagePin;
  struct Trail;
  void up(std::span<Lane> lanes, std::vector<Trail>& trail, const TrunkOptions& options);
  void down(std::span<Lane> lanes, std::vector<Trail>& trail, GradientSink& sink,
            const TrunkOptions& options);
  bool is_asked_to_look() const;
  std::vector<Tensor> look(std::span<const Lane> lanes, KvCache* cache = nullptr);
  static Pass pass_of(const Lane& lane, const Tensor& look_BTD, int stage,
                      const TrunkOptions& options);
  std::string what_is_not_finite(int stage) const;

  Model& model_;
  dist::BlockStore& store_;
  int prefetch_blocks_;
  std::vector<std::vector<Weight*>>
      weights_;  ///< of each block, to end the life of their dense copies
};

}  // namespace graft::models
