#!/usr/bin/env python3
"""Writes what Hugging Face computes on tiny random models, for the C++ and command-line tests to compare with.

    make_fixtures.py --output DIR        float32 on the CPU, one thread, no randomness: equal runs write equal numbers

DIR/<case>/model/               as save_pretrained writes it: config.json, two or more safetensors shards and their index
DIR/<case>/adapter/             a LoRA adapter as PEFT writes it: r 4, alpha 8, all linear layers, B not zero
DIR/<case>/rows.h5              the two rows of input_ids as a Graft shard of kind `tokens`, loss_mask from labels
DIR/<case>/oracle.safetensors   input_ids, labels   int64   [2, 24]      labels are not shifted, -100 = no target
                                logits              float32 [2, 24, V]   of the base
                                adapter_logits      float32 [2, 24, V]   with the adapter
                                grad.<key>          float32              of adapter_loss, <key> as in the adapter
DIR/<case>/oracle.json          loss, adapter_loss: mean over num_targets; train: settings, and the losses of ten AdamW
                                steps from that adapter (before each update), without clipping and with max_grad_norm 1
DIR/<case>/full.safetensors     grad.<name>         float32              of loss, of every parameter of the model
DIR/<case>/full.json            losses of ten AdamW steps of all parameters, and with max_grad_norm 1, as in `train`;
                                FULL has their learning rate and weight decay

DIR/<case>/fish.safetensors     places.<module>     int64   [n]          row-major, of the values with the largest Fisher information
                                                                     of the two rows, each a sample, over all linear layers
DIR/<case>/fish.json            how many of how many, and losses of ten AdamW steps of these values, as in `train`

Cases: llama_tied, llama_llama3_rope, mistral_window, qwen2, qwen3, and llama_nf4: a file of bitsandbytes, NF4 with double
quantisation, whose expected numbers come from its weights dequantised by bitsandbytes.
Beside them DIR/llama_square/model/ and llama_heads/model/: see BASES; DIR/peft_methods/<name>/: see peft_methods.py and
peft_prompts.py; DIR/lora_starts/: see lora_starts.py; DIR/lora_steps/: see lora_steps.py;
DIR/xlora/: see xlora.py; DIR/optimisers.safetensors: see optimisers.py; DIR/adapter_sums.safetensors: see adapter_sums.py; DIR/adapter_hub/: see adapter_hub.py.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import bitsandbytes
import h5py
import numpy as np
import peft
import torch
import transformers
from rule import LENGTH, ROWS, VOCABULARY, fill, rows_and_labels
from safetensors.torch import load_file, save_file

TRAIN = {"optim": "adamw", "learning_rate": 1e-2, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0,
         "lr_scheduler_type": "constant", "steps": 10}
FULL = TRAIN | {"learning_rate": 1e-3, "weight_decay": 0.01}
SHAPE = dict(vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=64, rms_norm_eps=1e-5,
             tie_word_embeddings=False, attn_implementation="eager")
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
# Widths in whole quantisation blocks of 64: bitsandbytes' CPU dequantisation is wrong for others.
CASES = {
    "llama_tied": transformers.LlamaConfig(**SHAPE | {"tie_word_embeddings": True}),
    "llama_llama3_rope": transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "mistral_window": transformers.MistralConfig(**SHAPE, sliding_window=5),
    "qwen2": transformers.Qwen2Config(**SHAPE | {"head_dim": 8}),
    "qwen3": transformers.Qwen3Config(**SHAPE),
    "llama_nf4": transformers.LlamaConfig(
        **SHAPE | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}),
}
# As wide as their heads together, which some methods of the references take for granted; only model/ is written.
BASES = {
    "llama_square": transformers.LlamaConfig(**SHAPE | {"head_dim": 8}),
    "llama_heads": transformers.LlamaConfig(**SHAPE | {"head_dim": 8, "num_key_value_heads": 6}),
}
ADAPTERS = pathlib.Path(__file__).resolve().parents[2] / ".venv/adapters"


def base_weight(name, parameter):
    if parameter.dim() == 1:
        return fill(name, parameter.shape, 0.2) + (1.0 if "norm" in name else 0.0)
    return fill(name, parameter.shape, 1.0 if "embed_tokens" in name else 0.25)


def adapter_weight(name, parameter):
    return fill(name, parameter.shape, 0.25 if "lora_A" in name else 0.1)


def set_parameters(named_parameters, weight):
    with torch.no_grad():
        for name, parameter in named_parameters:
            parameter.copy_(weight(name, parameter))


def save_sharded(model, directory):
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(directory, max_shard_size=int(0.6 * num_bytes))
    assert len(list(directory.glob("model-*.safetensors"))) >= 2, f"{directory}: expected two shards"


def save_nf4(model, directory):
    """Quantises through a dense copy on disk, and saves before any forward: a forward may rewrite the scales."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                             bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    with tempfile.TemporaryDirectory() as dense:
        model.save_pretrained(dense)
        quantised = transformers.AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=config, dtype=torch.float32, device_map="cpu")
    save_sharded(quantised, directory)
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                state = module.weight.quant_state
                dense_weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
                model.get_submodule(name).weight.copy_(dense_weight)


def write_rows(path, input_ids, labels):
    with h5py.File(path, "w") as file:
        file.attrs.update(graft_schema=1, kind="tokens", num_samples=ROWS, created_by="make_fixtures.py",
                          tokenizer_sha256="0" * 64, vocab_size=VOCABULARY)
        file["tokens"] = input_ids.reshape(-1).numpy().astype(np.uint32)
        file["offsets"] = np.arange(ROWS + 1, dtype=np.uint64) * LENGTH
        file["loss_mask"] = (labels.reshape(-1) != -100).numpy().astype(np.uint8)


def adamw_losses(model, batch, max_grad_norm, train=TRAIN):
    """Trains what requires gradients in place."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=train["learning_rate"], betas=train["betas"], eps=train["eps"],
                                  weight_decay=train["weight_decay"])
    losses = []
    for _ in range(train["steps"]):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def write_full(config, batch, directory):
    """What full fine-tuning computes: a copy of its own, since it moves the weights."""
    losses = {}
    for key, max_grad_norm in {"losses": None, "losses_max_grad_norm_1": 1.0}.items():
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        set_parameters(model.named_parameters(), base_weight)
        if max_grad_norm is None:
            model(**batch).loss.backward()
            save_file({f"grad.{n}": p.grad.clone() for n, p in model.named_parameters()}, directory / "full.safetensors")
        losses[key] = adamw_losses(model, batch, max_grad_norm, FULL)
    (directory / "full.json").write_text(json.dumps(FULL | losses, indent=2) + "\n")


def write_fish(config, batch, directory):
    """A loop with batch 1 for the Fisher information; then the values of the mask as parameters of their own."""
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    set_parameters(model.named_parameters(), base_weight)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    fisher = {n: torch.zeros_like(m.weight) for n, m in linears.items()}
    for row in range(ROWS):
        model.zero_grad()
        one = {key: value[row:row + 1] for key, value in batch.items()}
        (model(**one).loss * (one["labels"][:, 1:] != -100).sum()).backward()
        for name, module in linears.items():
            fisher[name] += module.weight.grad**2
    flat = torch.cat([f.flatten() for f in fisher.values()])
    order = flat.argsort(descending=True, stable=True)
    count = int(0.01 * flat.numel())
    while flat[order[count - 1]] < 1.001 * flat[order[count]]:  # a gap that rounding cannot close
        count += 1
    chosen, begin, places, values = order[:count], 0, {}, {}
    for name, module in linears.items():
        end = begin + module.weight.numel()
        places[name] = (chosen[(chosen >= begin) & (chosen < end)] - begin).sort().values
        values[name] = torch.nn.Parameter(torch.zeros(len(places[name])))
        begin = end
    weights = {n: m.weight.detach().clone() for n, m in linears.items()}

    def sparse_weights():
        return {f"{n}.weight": (w.flatten().scatter_add(0, places[n], values[n])).view_as(w) for n, w in weights.items()}

    optimizer = torch.optim.AdamW(values.values(), lr=TRAIN["learning_rate"], weight_decay=0.0)
    losses = []
    for _ in range(TRAIN["steps"]):
        optimizer.zero_grad()
        loss = torch.func.functional_call(model, sparse_weights(), kwargs=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    save_file({f"places.{n}": p for n, p in places.items()}, directory / "fish.safetensors")
    facts = {"count": count, "total": flat.numel(), "losses": losses}
    (directory / "fish.json").write_text(json.dumps(facts, indent=2) + "\n")


def write_case(name, config, directory):
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    set_parameters(model.named_parameters(), base_weight)
    (save_nf4 if name.endswith("nf4") else save_sharded)(model, directory / "model")

    input_ids, labels = rows_and_labels()
    write_rows(directory / "rows.h5", input_ids, labels)
    batch = {"input_ids": input_ids, "labels": labels}
    with torch.no_grad():
        base = model(**batch)

    if not name.endswith("nf4"):
        write_full(config, batch, directory)
        write_fish(config, batch, directory)

    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    model.name_or_path = name
    model = peft.get_peft_model(model, lora).eval()
    trainable = [(n.replace(".default", ""), p) for n, p in model.named_parameters() if p.requires_grad]
    set_parameters(trainable, adapter_weight)
    model.save_pretrained(directory / "adapter", save_embedding_layers=False)
    assert load_file(directory / "adapter/adapter_model.safetensors").keys() == dict(trainable).keys()

    adapted = model(**batch)
    adapted.loss.backward()
    gradients = {f"grad.{n}": p.grad.clone() for n, p in trainable}
    losses = adamw_losses(model, batch, max_grad_norm=None)
    set_parameters(trainable, adapter_weight)
    clipped_losses = adamw_losses(model, batch, max_grad_norm=1.0)

    save_file({"input_ids": input_ids, "labels": labels, "logits": base.logits,
               "adapter_logits": adapted.logits.detach(), **gradients}, directory / "oracle.safetensors")
    oracle = {
        "model_type": config.model_type,
        "num_targets": int((labels != -100).sum()),
        "loss": base.loss.item(),
        "adapter_loss": adapted.loss.item(),
        "train": TRAIN | {"losses": losses, "losses_max_grad_norm_1": clipped_losses},
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, bitsandbytes)},
    }
    (directory / "oracle.json").write_text(json.dumps(oracle, indent=2) + "\n")
    print(f"{name}: loss {oracle['loss']:.6f}, with adapter {oracle['adapter_loss']:.6f}, trained {losses[-1]:.6f}")


def write_base(config, directory):
    shutil.rmtree(directory, ignore_errors=True)
    model = transformers.AutoModelForCausalLM.from_config(config)
    set_parameters(model.named_parameters(), base_weight)
    save_sharded(model, directory / "model")


def write_adapter_hub(output):
    """A process of its own: the `adapters` package needs another transformers than PEFT."""
    if not (ADAPTERS / "adapters").is_dir():
        sys.exit(f"{ADAPTERS} has no `adapters` package: run cluster/install.sh test")
    script = pathlib.Path(__file__).with_name("adapter_hub.py")
    subprocess.run([sys.executable, script, "--models", output, "--output", output / "adapter_hub"], check=True,
                   env=os.environ | {"PYTHONPATH": str(ADAPTERS)})


def copies_of(model_directory):
    """@return a function that makes the model anew, in float32 and evaluation mode, with equal weights each time"""
    weights = transformers.AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32,
                                                                attn_implementation="eager")

    def copy():
        model = transformers.AutoModelForCausalLM.from_config(weights.config, dtype=torch.float32,
                                                              attn_implementation="eager")
        model.load_state_dict(weights.state_dict())
        return model.eval()

    return copy


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for name, config in CASES.items():
        write_case(name, config, output / name)
    for name, config in BASES.items():
        write_base(config, output / name)
    write_adapter_hub(output)
    import adapter_sums  # these import this file
    import lora_starts
    import lora_steps
    import optimisers
    import peft_methods
    import peft_prompts
    import xlora

    optimisers.write(output / "optimisers.safetensors")
    peft_methods.write(output / "qwen2/model", output / "peft_methods")
    peft_prompts.write(output, output / "peft_methods")
    lora_starts.write(output / "qwen2/model", output / "lora_starts")
    xlora.write(output / "qwen2/model", output / "xlora")
    lora_steps.write(output / "qwen2/model", output / "lora_steps")
    adapter_sums.write(output / "qwen2/model", output / "peft_methods", output / "adapter_sums.safetensors")


if __name__ == "__main__":
    main()
