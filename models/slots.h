// The seam between models and methods: seven kinds of slot. A slot is around advice: an adapter
// gets the input, the thing it wraps and the Pass, and returns the output, so additive,
// multiplicative, inserted and replacing methods share one signature and stacking two methods is
// nesting: the last one attached is the outermost. Models hold Slots and know no method; methods
// (peft/) derive adapters and know no model.
#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/module.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "models/pass.h"

namespace graft::models {

/// The adapters that run, innermost first. The first num_frozen() of them see a Pass that is no
/// training, so nothing is dropped from what they give.
template <class A>
class Slot {
 public:
  struct Frozen {
    size_t owner;  ///< whose it is: a number of the caller's
    std::shared_ptr<A> adapter;
  };

  bool empty() const { return adapters_.empty(); }
  size_t size() const { return adapters_.size(); }
  void push(std::shared_ptr<A> adapter) { adapters_.push_back(std::move(adapter)); }
  void pop() { adapters_.pop_back(); }  ///< the outermost
  void clear() { *this = Slot(); }
  const std::vector<std::shared_ptr<A>>& adapters() const { return adapters_; }

  /// Those pushed since the last call are frozen.
  void freeze(size_t owner) {
    for (size_t i = num_frozen_; i < adapters_.size(); ++i)
      frozen_.push_back({owner, adapters_[i]});
    num_frozen_ = adapters_.size();
  }
  /// All that were frozen, whether they run or not.
  const std::vector<Frozen>& frozen() const { return frozen_; }
  /// From now on these run, and nothing else.
  void run_frozen(std::vector<std::shared_ptr<A>> adapters) {
    adapters_ = std::move(adapters);
    num_frozen_ = adapters_.size();
  }
  size_t num_frozen() const { return num_frozen_; }

 private:
  std::vector<std::shared_ptr<A>> adapters_;
  std::vector<Frozen> frozen_;
  size_t num_frozen_ = 0;
};

/// kGain: the vector of a norm, of which adapters give another: only merged() is asked, with [D].
enum class LinearKind { kLinear, kEmbedding, kGain };

/// What a method may know of a matrix before any weight is loaded.
struct LinearInfo {
  std::string name;  ///< "block.3.attn.q"; its role is the tail, "attn.q"
  int64_t in = 0, out = 0;
  bool has_bias = false;
  LinearKind kind = LinearKind::kLinear;
};

/// What a LinearAdapter wraps: the frozen matrix, or the adapters below it.
class LinearOp {
 public:
  virtual ~LinearOp() = default;
  /// x [..., in] -> [..., out]; for an embedding x holds token numbers and the result is [..., D].
  virtual Tensor operator()(const Tensor& x) const = 0;
  /// The dense matrix [out, in] (embedding: [V, D]) with everything below merged in. Autograd may
  /// keep it.
  virtual Tensor weight() const = 0;
};

/// s B A x: A [r, in], B [out, r].
struct LowRank {
  Tensor a, b;
  double scale = 1;
};

/// Placed at every linear, embedding and head: attn.{q,k,v,o}, mlp.{gate,up,down}, embed, head.
class LinearAdapter : public torch::nn::Module {
 public:
  virtual Tensor forward(const Tensor& x, const LinearOp& base, const Pass& pass) = 0;
  virtual bool mergeable() const { return false; }
  /// The matrix that alone does what base and adapter do; `w` is not changed.
  virtual Tensor merged(const Tensor& w) const;
  /// Where all it does is to add a vector: the bias that alone does what `b`, that of what it
  /// wraps, and the adapter do. Undefined: it does more.
  virtual Tensor merged_bias(const Tensor& /*b*/) const { return {}; }
  /// The factors, if without dropout all it does is to add such a product to what it wraps:
  /// several of a slot can then run as one.
  virtual std::optional<LowRank> low_rank() const { return std::nullopt; }
  /// Whether forward() or initial values ask for LinearOp::weight(), which only mergeable adapters
  /// below can give.
  virtual bool needs_weight() const { return false; }
  /// Whether it computes without what it wraps: an adapter below would do nothing.
  virtual bool replaces() const { return false; }
};

/// Placed around attention, MLP and whole blocks: attn, mlp, block.
class SublayerAdapter : public torch::nn::Module {
 public:
  using Sublayer = std::function<Tensor(const Tensor& h_BLD)>;
  virtual Tensor forward(const Tensor& h_BLD, const Sublayer& sublayer, const Pass& pass) = 0;
};

/// Placed around softmax(q k^T) v: attn.core. q [B, H, L, K]; k and v [B, heads of k, L', K].
class AttentionAdapter : public torch::nn::Module {
 public:
  using Core = std::function<Tensor(const Tensor& q, const Tensor& k, const Tensor& v)>;
  virtual Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const Core& core,
                         const Pass& pass) = 0;
};

/// Placed before the first block and before each: input, block.input. Must be pure: recompute calls
/// it again.
class SequenceAdapter : public torch::nn::Module {
 public:
  virtual Carry edit(Carry carry, const Pass& pass) = 0;
  /// Whether it, or another adapter of its method, reads Pass::look_BTD: the base then runs twice.
  virtual bool looks() const { return false; }
};

/// Placed on single tensors: norm.* (a norm's output), block.out, logits.
class TensorAdapter : public torch::nn::Module {
 public:
  virtual Tensor forward(const Tensor& t, const Pass& pass) = 0;
};

/// Placed around each stage: side networks whose state rides in the carry.
class CarryAdapter : public torch::nn::Module {
 public:
  using Stage = std::function<Carry(Carry)>;
  virtual Carry forward(Carry carry, const Stage& stage, const Pass& pass) = 0;
};

/// Placed at the loss.
class LossAdapter : public torch::nn::Module {
 public:
  /// A sum over the lane's targets, added to the loss sum. Undefined: it adds nothing.
  virtual Tensor term(const Carry& carry, const Pass& pass) = 0;
};

/// Runs `base` through the adapters of a slot, innermost first.
Tensor run(const Slot<LinearAdapter>& slot, const LinearOp& base, const Tensor& x,
           const Pass& pass);
Tensor run(const Slot<SublayerAdapter>& slot, const Tensor& h_BLD,
           const SublayerAdapter::Sublayer& sublayer, const Pass& pass);
Tensor run(const Slot<AttentionAdapter>& slot, const Tensor& q, const Tensor& k, const Tensor& v,
           const AttentionAdapter::Core& core, const Pass& pass);
Carry run(const Slot<SequenceAdapter>& slot, Carry carry, const Pass& pass);
Tensor run(const Slot<TensorAdapter>& slot, Tensor t, const Pass& pass);
Carry run(const Slot<CarryAdapter>& slot, const Carry& carry, const CarryAdapter::Stage& stage,
          const Pass& pass);

}  // namespace graft::models
