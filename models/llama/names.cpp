// What the weights of the Llama family are called: Llama, Mistral, Qwen2.5, Qwen3, SmolLM2.
#include "models/llama/llama.h"

namespace graft::models {

const NameMap& llama_names(bool permuted_gguf, Task task) {
  static const auto table = [](Transform q, Transform k, bool classifies) {
    const NameRow head = classifies ? NameRow{"head.weight", "score.weight", "score.weight"}
                                    : NameRow{"head.weight", "lm_head.weight", "output.weight"};
    std::vector<std::string_view> drops = {".rotary_emb.inv_freq", ".masked_bias", ".position_ids",
                                           "rope_freqs.weight"};
    if (classifies) drops.insert(drops.end(), {"lm_head.weight", "output.weight"});
    return NameMap(
        {
            {"embed.weight", "model.embed_tokens.weight", "token_embd.weight"},
            {"block.{i}.attn_norm.weight", "model.layers.{i}.input_layernorm.weight",
             "blk.{i}.attn_norm.weight"},
            {"block.{i}.attn.q.weight", "model.layers.{i}.self_attn.q_proj.weight",
             "blk.{i}.attn_q.weight", q},
            {"block.{i}.attn.k.weight", "model.layers.{i}.self_attn.k_proj.weight",
             "blk.{i}.attn_k.weight", k},
            {"block.{i}.attn.v.weight", "model.layers.{i}.self_attn.v_proj.weight",
             "blk.{i}.attn_v.weight"},
            {"block.{i}.attn.o.weight", "model.layers.{i}.self_attn.o_proj.weight",
             "blk.{i}.attn_output.weight"},
            {"block.{i}.attn.q.bias", "model.layers.{i}.self_attn.q_proj.bias",
             "blk.{i}.attn_q.bias", q},
            {"block.{i}.attn.k.bias", "model.layers.{i}.self_attn.k_proj.bias",
             "blk.{i}.attn_k.bias", k},
            {"block.{i}.attn.v.bias", "model.layers.{i}.self_attn.v_proj.bias",
             "blk.{i}.attn_v.bias"},
            {"block.{i}.attn.o.bias", "model.layers.{i}.self_attn.o_proj.bias",
             "blk.{i}.attn_output.bias"},
            {"block.{i}.attn.q_norm.weight", "model.layers.{i}.self_attn.q_norm.weight",
             "blk.{i}.attn_q_norm.weight"},
            {"block.{i}.attn.k_norm.weight", "model.layers.{i}.self_attn.k_norm.weight",
             "blk.{i}.attn_k_norm.weight"},
            {"block.{i}.mlp_norm.weight", "model.layers.{i}.post_attention_layernorm.weight",
             "blk.{i}.ffn_norm.weight"},
            {"block.{i}.mlp.gate.weight", "model.layers.{i}.mlp.gate_proj.weight",
             "blk.{i}.ffn_gate.weight"},
            {"block.{i}.mlp.up.weight", "model.layers.{i}.mlp.up_proj.weight",
             "blk.{i}.ffn_up.weight"},
            {"block.{i}.mlp.down.weight", "model.layers.{i}.mlp.down_proj.weight",
             "blk.{i}.ffn_down.weight"},
            {"block.{i}.mlp.gate.bias", "model.layers.{i}.mlp.gate_proj.bias",
             "blk.{i}.ffn_gate.bias"},
            {"block.{i}.mlp.up.bias", "model.layers.{i}.mlp.up_proj.bias", "blk.{i}.ffn_up.bias"},
            {"block.{i}.mlp.down.bias", "model.layers.{i}.mlp.down_proj.bias",
             "blk.{i}.ffn_down.bias"},
            {"final_norm.weight", "model.norm.weight", "output_norm.weight"},
            head,
            {"head.bias", "score.bias", "score.bias"},
        },
        std::move(drops));
  };
  constexpr auto kQ = Transform::kPermuteRopeQ, kK = Transform::kPermuteRopeK;
  constexpr auto kNone = Transform::kIdentity;
  static const NameMap permuted[] = {table(kQ, kK, false), table(kQ, kK, true)};
  static const NameMap straight[] = {table(kNone, kNone, false), table(kNone, kNone, true)};
  return (permuted_gguf ? permuted : straight)[task == Task::kCausalLm ? 0 : 1];
}

}  // namespace graft::models
