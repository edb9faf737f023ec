// Model: a list of stages over a carry, written for one device. It knows neither ranks nor methods:
// its matrices are Weights, its open places are Slots, and models/trunk.h walks the stages.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "models/slots.h"
#include "models/task.h"
#include "models/weight.h"

namespace graft::models {

class NameMap;

/// Shown everything a model is made of, in a fixed order. Names are ours: "block.3.attn.q.weight",
/// "block.3.attn.q".
class Visitor {
 public:
  virtual ~Visitor() = default;
  virtual void weight(const std::string& /*name*/, Weight& /*weight*/) {}
  virtual void slot(const LinearInfo& /*info*/, Slot<LinearAdapter>& /*slot*/) {}
  virtual void slot(const std::string& /*name*/, Slot<SublayerAdapter>& /*slot*/) {}
  virtual void slot(const std::string& /*name*/, Slot<AttentionAdapter>& /*slot*/) {}
  virtual void slot(const std::string& /*name*/, Slot<SequenceAdapter>& /*slot*/) {}
  virtual void slot(const std::string& /*name*/, Slot<TensorAdapter>& /*slot*/) {}
  virtual void slot(const std::string& /*name*/, Slot<CarryAdapter>& /*slot*/) {}
  virtual void slot(const std::string& /*name*/, Slot<LossAdapter>& /*slot*/) {}
};

struct ModelInfo {
  std::string family;      ///< "llama"
  std::string model_type;  ///< Hugging Face's, "qwen3"
  std::string hf_class;    ///< "Qwen3ForCausalLM"
  Task task = Task::kCausalLm;
  int64_t hidden_size = 0, head_dim = 0, num_layers = 0, vocab_size = 0, max_length = 0;
  int64_t num_outputs = 0;          ///< of the head: the vocabulary, or a classifier's labels
  double initializer_range = 0.02;  ///< deviation of a new head's first values
  bool tied_head = false;
  /// Multiply-adds of the frozen matrices for one token, forward: blocks, and head.
  int64_t block_macs = 0, head_macs = 0;
  /// Multiply-adds of attention scores and values for one token and one key, all layers.
  int64_t attention_macs = 0;
};

class Model {
 public:
  virtual ~Model() = default;

  /// Stage 0 embeds, the last one is head and loss.
  virtual int num_stages() const = 0;
  virtual Carry stage(int i, Carry carry, const Pass& pass) const = 0;

  /// A block is the unit of sharding and gathering. Blocks of one pool share the buffers they are
  /// gathered into.
  struct BlockInfo {
    int pool;
  };
  virtual int num_blocks() const = 0;
  virtual BlockInfo block(int block) const = 0;
  /// Buffers of each pool: 2 makes a window that is prefetched, 1 an edge.
  virtual std::vector<int> pools() const = 0;
  /// The blocks a stage reads, to be pinned while it runs.
  virtual std::vector<int> blocks_of(int stage) const = 0;
  /// Weights of one block; slots of one stage.
  virtual void visit_weights(int block, Visitor& visitor) = 0;
  virtual void visit_slots(int stage, Visitor& visitor) = 0;

  virtual ModelInfo info() const = 0;
  virtual const NameMap& names() const = 0;
};

/// Calls fn(block, name, weight) for all weights of a model, in its order.
template <class Fn>
void for_each_weight(Model& model, const Fn& fn) {
  struct Each : Visitor {
    const Fn& fn;
    int block = 0;
    explicit Each(const Fn& f) : fn(f) {}
    void weight(const std::string& name, Weight& w) override { fn(block, name, w); }
  } each(fn);
  for (; each.block < model.num_blocks(); ++each.block) model.visit_weights(each.block, each);
}

}  // namespace graft::models
