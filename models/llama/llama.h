// The Llama family: Llama 2/3/3.x, Mistral, Qwen2.5, Qwen3, SmolLM2. One pre-norm decoder; variants
// are data. Shape letters: B rows, L positions, D width, H query heads, K head width.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <string>
#include <vector>

#include "models/model.h"
#include "models/names.h"
#include "models/nn/linear.h"
#include "models/nn/norm.h"
#include "models/nn/rope.h"
#include "models/task.h"

namespace graft::models {

struct LlamaConfig {
  std::string model_type = "llama";
  int64_t hidden_size = 0, num_hidden_layers = 0, num_attention_heads = 0, num_key_value_heads = 0;
  int64_t head_dim = 0, intermediate_size = 0, vocab_size = 0, max_position_embeddings = 0;
  double rms_norm_eps = 1e-5;
  RopeConfig rope;
  Task task = Task::kCausalLm;
  int64_t num_labels = 0;  ///< of a classifier
  double initializer_range = 0.02;
  bool tie_word_embeddings = false;
  bool qkv_bias = false, o_bias = false, mlp_bias = false;
  bool qk_norm = false;
  std::vector<int64_t> window;  ///< of each layer; 0: the whole document

  /// From a Hugging Face config.json of either generation (4.x and 5.x field names).
  /// @throws graft::Error (kData) naming the field
  static LlamaConfig from_json(const nlohmann::json& config);
};

const NameMap& llama_names(bool permuted_gguf, Task task);

struct LlamaAttention {
  Linear q, k, v, o;
  RmsNorm q_norm, k_norm;  ///< Qwen3: over each head, before the rotation
  Slot<AttentionAdapter> core;
  int64_t head_dim, window;
  bool qk_norm;

  LlamaAttention(const LlamaConfig& config, int layer);
  Tensor operator()(const Tensor& x_BLD, const Sequence& sequence, int layer,
                    const Pass& pass) const;
};

struct LlamaMlp {
  Linear gate, up, down;

  LlamaMlp(const LlamaConfig& config, int layer);
  Tensor operator()(const Tensor& x_BLD, const Pass& pass) const;
};

struct LlamaBlock {
  int layer;
  RmsNorm attn_norm, mlp_norm;
  LlamaAttention attn;
  LlamaMlp mlp;
  Slot<SublayerAdapter> attn_out, mlp_out, whole;
  Slot<SequenceAdapter> input;
  Slot<TensorAdapter> out;
  Slot<CarryAdapter> around;

  LlamaBlock(const LlamaConfig& config, int layer);
  Tensor operator()(const Tensor& h_BLD, const Sequence& sequence, const Pass& pass) const;
  void visit_weights(Visitor& visitor);
  void visit_slots(Visitor& visitor);
};

/// Stages: 0 embeds, 1..N are the blocks, N+1 is final norm, head and loss.
class Llama : public Model {
 public:
  explicit Llama(LlamaConfig config);
  int num_stages() const override { return static_cast<int>(blocks_.size()) + 2; }
  Carry stage(int i, Carry carry, const Pass& pass) const override;
  int num_blocks() const override;
  BlockInfo block(int block) const override;
  std::vector<int> pools() const override { return {2, 1, 1}; }
  std::vector<int> blocks_of(int stage) const override;
  void visit_weights(int block, Visitor& visitor) override;
  void visit_slots(int stage, Visitor& visitor) override;
  ModelInfo info() const override;
  const NameMap& names() const override;

 private:
  Carry embed(const Pass& pass) const;
  Carry head(const Carry& carry, const Pass& pass) const;
  Tensor loss(const Tensor& hidden_BTD, const Carry& carry, const Pass& pass) const;

  LlamaConfig config_;
  Embedding embed_;
  std::vector<LlamaBlock> blocks_;
  RmsNorm final_norm_;
  Linear head_;  ///< its weight is undefined when the head shares the embedding's table
  Slot<SequenceAdapter> input_;
  Slot<TensorAdapter> logits_;
  Slot<LossAdapter> loss_;
};

}  // namespace graft::models
