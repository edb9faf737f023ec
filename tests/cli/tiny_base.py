"""Shared by the tests of the verbs that look, merge and export: a tiny base, and adapters on it."""

from __future__ import annotations

import json
import subprocess

import gguf
import numpy as np
from graft_cli import GRAFT
from safetensors.numpy import load_file, save_file

HEADS, KEY_HEADS, HEAD_DIM, WIDTH, INNER, VOCABULARY, LAYERS = 4, 2, 8, 24, 40, 32, 2
SHAPES = {"self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH), "self_attn.k_proj": (KEY_HEADS * HEAD_DIM, WIDTH),
          "self_attn.v_proj": (KEY_HEADS * HEAD_DIM, WIDTH), "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
          "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"]}


def run(*arguments, code=0):
    done = subprocess.run([GRAFT, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout if code == 0 else done.stderr


def facts(*arguments):
    return json.loads(run(*arguments, "--json"))


def base_tensors(rng, tied):
    tensors = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        tensors |= {f"model.layers.{i}.{name}.weight": shape for name, shape in SHAPES.items()}
        tensors |= {f"model.layers.{i}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
    if not tied:
        tensors["lm_head.weight"] = (VOCABULARY, WIDTH)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in tensors.items()}


def config(tied):
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "intermediate_size": INNER,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "head_dim": HEAD_DIM,
            "vocab_size": VOCABULARY, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": tied, "torch_dtype": "float32"}


def write_model(folder, tied=False):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(tied)))
    (folder / "tokenizer.json").write_text("{}")
    save_file(base_tensors(np.random.default_rng(1), tied), folder / "model.safetensors")
    return folder


def write_adapter(folder, changes=None, modules=None, zero_b=False):
    """A LoRA adapter of random numbers on `modules` (path -> (out, in)), default: those of LORA in every layer."""
    rng, settings = np.random.default_rng(2), LORA | (changes or {})
    modules = modules or {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in SHAPES.items()
                          if name.split(".")[1] in settings["target_modules"]}
    tensors = {}
    for path, (rows, columns) in modules.items():
        r = settings.get("rank_pattern", {}).get(path, settings["r"])
        tensors[f"base_model.model.{path}.lora_A.weight"] = rng.standard_normal((r, columns), np.float32)
        tensors[f"base_model.model.{path}.lora_B.weight"] = rng.standard_normal((rows, r), np.float32) * (0 if zero_b else 0.1)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def factors(adapter, path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    return (tensors[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")


def to_gguf_rows(rows, heads):
    """As llama.cpp's converter does it for Llama: LlamaModel.permute."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def add_tokenizer(writer):
    """A letter a token, one merge, and special tokens; as many as VOCABULARY."""
    tokens = [*"abcdefghijklmnopqrstuvwxyz", "\u0120", "ab", "<s>", "</s>", "<eot>", "<unk>"]
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("gpt-2"), writer.add_token_list(tokens)
    writer.add_token_types([1] * 28 + [3] * 4), writer.add_token_merges(["a b"]), writer.add_add_bos_token(True)
    writer.add_bos_token_id(28), writer.add_eos_token_id(29), writer.add_eot_token_id(30), writer.add_unk_token_id(31)


def write_gguf(path, tensors, tokenizer=False):
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    layer = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"model.layers.{i}.{hf}": f"blk.{i}.{ours}" for i in range(LAYERS) for hf, ours in layer.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS), writer.add_context_length(64), writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER), writer.add_head_count(HEADS), writer.add_head_count_kv(KEY_HEADS)
    writer.add_key_length(HEAD_DIM), writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_freq_base(10000.0)
    if tokenizer:
        add_tokenizer(writer)
    for name, value in tensors.items():
        heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(name.split(".")[-2])
        writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", to_gguf_rows(value, heads) if heads else value)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return path
