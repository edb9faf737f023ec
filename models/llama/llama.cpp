#include "models/llama/llama.h"

#include <ATen/ATen.h>

#include "configs/check.h"
#include "kernels/rope/rope.h"
#include "kernels/swiglu/swiglu.h"
#include "kernels/xent/xent.h"
#include "models/nn/attention.h"
#include "models/nn/sequence.h"

namespace graft::models {
namespace {

std::string slot_name(int layer, const char* role) {
  return "block." + std::to_string(layer) + (*role != '\0' ? "." : "") + role;
}

/// Appends to a layer's cache and returns all keys and values so far.
KvCache::Layer extend(KvCache& cache, int layer, const Tensor& k, const Tensor& v) {
  cache.layers.resize(std::max(cache.layers.size(), static_cast<size_t>(layer) + 1));
  KvCache::Layer& seen = cache.layers[static_cast<size_t>(layer)];
  seen.k = seen.k.defined() ? at::cat({seen.k, k}, 2) : k;
  seen.v = seen.v.defined() ? at::cat({seen.v, v}, 2) : v;
  return seen;
}

void visit(Visitor& visitor, const std::string& name, RmsNorm& norm) {
  visitor.weight(name + ".weight", norm.weight);
}

void visit(Visitor& visitor, Linear& linear) {
  if (linear.weight.defined()) visitor.weight(linear.info.name + ".weight", linear.weight);
  if (linear.bias.defined()) visitor.weight(linear.info.name + ".bias", linear.bias);
}

void visit_gain(Visitor& visitor, const std::string& name, RmsNorm& norm) {
  const int64_t width = norm.weight.numel();
  visitor.slot(LinearInfo{name, width, width, false, LinearKind::kGain}, norm.gain);
}

}  // namespace

// --- the block
// --------------------------------------------------------------------------------------------------

LlamaAttention::LlamaAttention(const LlamaConfig& c, int layer)
    : q(slot_name(layer, "attn.q"), c.hidden_size, c.num_attention_heads * c.head_dim, c.qkv_bias),
      k(slot_name(layer, "attn.k"), c.hidden_size, c.num_key_value_heads * c.head_dim, c.qkv_bias),
      v(slot_name(layer, "attn.v"), c.hidden_size, c.num_key_value_heads * c.head_dim, c.qkv_bias),
      o(slot_name(layer, "attn.o"), c.num_attention_heads * c.head_dim, c.hidden_size, c.o_bias),
      q_norm(c.head_dim, c.rms_norm_eps),
      k_norm(c.head_dim, c.rms_norm_eps),
      head_dim(c.head_dim),
      window(c.window[static_cast<size_t>(layer)]),
      qk_norm(c.qk_norm) {}

Tensor LlamaAttention::operator()(const Tensor& x_BLD, const Sequence& sequence, int layer,
                                  const Pass& pass) const {
  const auto heads = [&](const Tensor& t) { return t.unflatten(-1, {-1, head_dim}); };
  Tensor q_BLHK = heads(q(x_BLD, pass)), k_BLHK = heads(k(x_BLD, pass));
  if (qk_norm) q_BLHK = q_norm(q_BLHK, pass), k_BLHK = k_norm(k_BLHK, pass);
  Tensor q_BHLK = kernels::rope(q_BLHK, sequence.cos_BLK, sequence.sin_BLK).transpose(1, 2);
  Tensor k_BHLK = kernels::rope(k_BLHK, sequence.cos_BLK, sequence.sin_BLK).transpose(1, 2);
  Tensor v_BHLK = heads(v(x_BLD, pass)).transpose(1, 2);
  if (pass.cache != nullptr) {
    const KvCache::Layer all = extend(*pass.cache, layer, k_BHLK, v_BHLK);
    k_BHLK = all.k, v_BHLK = all.v;
  }
  const AttentionAdapter::Core attend = [&](const Tensor& q_, const Tensor& k_, const Tensor& v_) {
    return causal_attention(q_, k_, v_, sequence, window);
  };
  const Tensor out_BHLK = core.empty() ? attend(q_BHLK, k_BHLK, v_BHLK)
                                       : run(core, q_BHLK, k_BHLK, v_BHLK, attend, pass);
  return o(out_BHLK.transpose(1, 2).flatten(2), pass);
}

LlamaMlp::LlamaMlp(const LlamaConfig& c, int layer)
    : gate(slot_name(layer, "mlp.gate"), c.hidden_size, c.intermediate_size, c.mlp_bias),
      up(slot_name(layer, "mlp.up"), c.hidden_size, c.intermediate_size, c.mlp_bias),
      down(slot_name(layer, "mlp.down"), c.intermediate_size, c.hidden_size, c.mlp_bias) {}

Tensor LlamaMlp::operator()(const Tensor& x_BLD, const Pass& pass) const {
  return down(kernels::swiglu(gate(x_BLD, pass), up(x_BLD, pass)), pass);
}

LlamaBlock::LlamaBlock(const LlamaConfig& c, int layer_number)
    : layer(layer_number),
      attn_norm(c.hidden_size, c.rms_norm_eps),
      mlp_norm(c.hidden_size, c.rms_norm_eps),
      attn(c, layer_number),
      mlp(c, layer_number) {}

Tensor LlamaBlock::operator()(const Tensor& h_BLD, const Sequence& sequence,
                              const Pass& pass) const {
  const auto attention = [&](const Tensor& x) { return attn(x, sequence, layer, pass); };
  const auto feed_forward = [&](const Tensor& x) { return mlp(x, pass); };
  const Tensor a = h_BLD + run(attn_out, attn_norm(h_BLD, pass), attention, pass.beside(h_BLD));
  return a + run(mlp_out, mlp_norm(a, pass), feed_forward, pass.beside(a));
}

void LlamaBlock::visit_weights(Visitor& visitor) {
  visit(visitor, slot_name(layer, "attn_norm"), attn_norm);
  for (Linear* linear : {&attn.q, &attn.k, &attn.v, &attn.o}) visit(visitor, *linear);
  if (attn.qk_norm) {
    visit(visitor, slot_name(layer, "attn.q_norm"), attn.q_norm);
    visit(visitor, slot_name(layer, "attn.k_norm"), attn.k_norm);
  }
  visit(visitor, slot_name(layer, "mlp_norm"), mlp_norm);
  for (Linear* linear : {&mlp.gate, &mlp.up, &mlp.down}) visit(visitor, *linear);
}

void LlamaBlock::visit_slots(Visitor& visitor) {
  for (Linear* linear : {&attn.q, &attn.k, &attn.v, &attn.o, &mlp.gate, &mlp.up, &mlp.down}) {
    visitor.slot(linear->info, linear->slot);
  }
  visitor.slot(slot_name(layer, "attn.core"), attn.core);
  visitor.slot(slot_name(layer, "attn"), attn_out);
  visitor.slot(slot_name(layer, "mlp"), mlp_out);
  visitor.slot(slot_name(layer, ""), whole);
  visitor.slot(slot_name(layer, "input"), input);
  visitor.slot(slot_name(layer, "out"), out);
  visitor.slot(slot_name(layer, "carry"), around);
  visitor.slot(slot_name(layer, "norm.attn"), attn_norm.slot);
  visitor.slot(slot_name(layer, "norm.mlp"), mlp_norm.slot);
  visit_gain(visitor, slot_name(layer, "attn_norm"), attn_norm);
  visit_gain(visitor, slot_name(layer, "mlp_norm"), mlp_norm);
  if (attn.qk_norm) {
    visitor.slot(slot_name(layer, "norm.q"), attn.q_norm.slot);
    visitor.slot(slot_name(layer, "norm.k"), attn.k_norm.slot);
    visit_gain(visitor, slot_name(layer, "attn.q_norm"), attn.q_norm);
    visit_gain(visitor, slot_name(layer, "attn.k_norm"), attn.k_norm);
  }
}

// --- the model
// --------------------------------------------------------------------------------------------------

Llama::Llama(LlamaConfig config)
    : config_(std::move(config)),
      embed_("embed", config_.vocab_size, config_.hidden_size),
      final_norm_(config_.hidden_size, config_.rms_norm_eps),
      head_("head", config_.hidden_size,
            config_.task == Task::kCausalLm ? config_.vocab_size : config_.num_labels,
            config_.task == Task::kTokenClassification, WeightUse::kTable) {
  if (config_.tie_word_embeddings) head_.weight = Weight();
  for (int i = 0; i < config_.num_hidden_layers; ++i) blocks_.emplace_back(config_, i);
}

Carry Llama::stage(int i, Carry carry, const Pass& pass) const {
  if (i == 0) return embed(pass);
  if (i == num_stages() - 1) return head(carry, pass);
  const LlamaBlock& block = blocks_[static_cast<size_t>(i) - 1];
  return run(
      block.around, run(block.input, std::move(carry), pass),
      [&](const Carry& c) {
        const auto whole = [&](const Tensor& h) { return block(h, *c.sequence, pass); };
        return c.with(run(block.out, run(block.whole, c.h(), whole, pass), pass));
      },
      pass);
}

Carry Llama::embed(const Pass& pass) const {
  const data::Batch& batch = *pass.batch;
  Carry carry{{embed_(batch.tokens_BL, pass)},
              std::make_shared<const Sequence>(make_sequence(batch))};
  carry = run(input_, std::move(carry), pass);
  auto sequence = std::make_shared<Sequence>(*carry.sequence);
  std::tie(sequence->cos_BLK, sequence->sin_BLK) = rope_tables(
      config_.rope, config_.head_dim, config_.max_position_embeddings, sequence->positions_BL);
  carry.sequence = std::move(sequence);
  return carry;
}

Carry Llama::head(const Carry& carry, const Pass& pass) const {
  Tensor hidden_BTD = final_norm_(at_tokens(carry), pass);
  if (pass.want == Want::kHidden) return carry.with(hidden_BTD);
  if (pass.want == Want::kLoss || pass.want == Want::kLossAndHits)
    return carry.with(loss(hidden_BTD, carry, pass));
  if (pass.want == Want::kLastLogits) hidden_BTD = hidden_BTD.slice(1, hidden_BTD.size(1) - 1);
  const Weight& table = head_.weight.defined() ? head_.weight : embed_.weight;
  const BaseLinearOp base(table, head_.bias);
  return carry.with(run(logits_, run(head_.slot, base, hidden_BTD, pass), pass));
}

/// Summed over the lane's targets. Positions without a label never reach the head.
Tensor Llama::loss(const Tensor& hidden_BTD, const Carry& carry, const Pass& pass) const {
  const Tensor hidden_ND = hidden_BTD.flatten(0, 1);
  const Tensor labels_N = pass.batch->labels_BL.flatten();
  const Weight& table = head_.weight.defined() ? head_.weight : embed_.weight;
  const bool adapted = pass.adapters && !(head_.slot.empty() && logits_.empty());
  const bool plain =
      !adapted && !table.is_trained() && !head_.bias.defined() && pass.want == Want::kLoss;
  Tensor sum, hits;
  if (plain) {
    sum = kernels::frozen_head_cross_entropy(hidden_ND, table.dense(), labels_N);
  } else {
    const Tensor rows = labels_N.ge(0).nonzero().squeeze(1);
    const BaseLinearOp base(table, head_.bias);
    const Tensor logits_NV =
        run(logits_, run(head_.slot, base, hidden_ND.index_select(0, rows), pass), pass);
    const Tensor labels = labels_N.index_select(0, rows);
    sum = kernels::cross_entropy(logits_NV, labels);
    hits = logits_NV.argmax(-1).eq(labels).sum().to(at::kDouble);
  }
  if (pass.adapters) {
    for (const auto& adapter : loss_.adapters()) {
      if (const Tensor term = adapter->term(carry, pass); term.defined()) sum = sum + term;
    }
  }
  return pass.want == Want::kLoss ? sum : at::stack({sum, hits});
}

// --- blocks, names, facts
// ---------------------------------------------------------------------------------------

int Llama::num_blocks() const { return num_stages() + (head_.weight.defined() ? 1 : 0); }

/// Blocks: 0 the embedding, 1..N the layers, N+1 the final norm, N+2 an untied head. The embedding
/// and the head share one buffer: a tied table is then gathered once for both.
Model::BlockInfo Llama::block(int block) const {
  const int layers = static_cast<int>(blocks_.size());
  if (block >= 1 && block <= layers) return {0};
  return {block == layers + 1 ? 2 : 1};
}

std::vector<int> Llama::blocks_of(int stage) const {
  const int final_stage = num_stages() - 1;
  if (stage < final_stage) return {stage};
  return {final_stage, head_.weight.defined() ? final_stage + 1 : 0};
}

void Llama::visit_weights(int block, Visitor& visitor) {
  const int final_block = num_stages() - 1;
  if (block == 0) {
    visitor.weight("embed.weight", embed_.weight);
  } else if (block < final_block) {
    blocks_[static_cast<size_t>(block) - 1].visit_weights(visitor);
  } else if (block == final_block) {
    visit(visitor, "final_norm", final_norm_);
  } else {
    visit(visitor, head_);
  }
}

void Llama::visit_slots(int stage, Visitor& visitor) {
  if (stage == 0) {
    visitor.slot(embed_.info, embed_.slot);
    visitor.slot("input", input_);
  } else if (stage < num_stages() - 1) {
    blocks_[static_cast<size_t>(stage) - 1].visit_slots(visitor);
  } else {
    visitor.slot("norm.final", final_norm_.slot);
    visit_gain(visitor, "final_norm", final_norm_);
    visitor.slot(head_.info, head_.slot);
    visitor.slot("logits", logits_);
    visitor.slot("loss", loss_);
  }
}

ModelInfo Llama::info() const {
  const LlamaConfig& c = config_;
  ModelInfo info;
  info.family = "llama";
  info.model_type = c.model_type;
  info.hf_class = c.model_type == "llama"     ? "Llama"
                  : c.model_type == "mistral" ? "Mistral"
                  : c.model_type == "qwen2"   ? "Qwen2"
                                              : "Qwen3";
  info.hf_class += names_of(c.task).hf_class;
  info.task = c.task;
  info.num_outputs = head_.info.out;
  info.initializer_range = c.initializer_range;
  info.hidden_size = c.hidden_size;
  info.head_dim = c.head_dim;
  info.num_layers = c.num_hidden_layers;
  info.vocab_size = c.vocab_size;
  info.max_length = c.max_position_embeddings;
  info.tied_head = c.tie_word_embeddings;
  const int64_t attention = c.num_attention_heads * c.head_dim,
                keys = c.num_key_value_heads * c.head_dim;
  info.block_macs =
      c.num_hidden_layers * c.hidden_size * (2 * attention + 2 * keys + 3 * c.intermediate_size);
  info.head_macs = c.hidden_size * head_.info.out;
  info.attention_macs = c.num_hidden_layers * 2 * attention;
  return info;
}

const NameMap& Llama::names() const {
  return llama_names(config_.model_type == "llama" || config_.model_type == "mistral",
                     config_.task);
}

std::unique_ptr<Model> make_llama(const nlohmann::json& config) {
  return std::make_unique<Llama>(LlamaConfig::from_json(config));
}

}  // namespace graft::models
