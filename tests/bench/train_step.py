"""Training step of the SmolLM2-135M shape, 1 x 512 tokens, LoRA r 16 on all linears, NF4 base: Graft beside
transformers + peft + bitsandbytes, in turn on the same machine, random weights.

usage: .venv/bin/python tests/bench/train_step.py [--steps 8] [--threads 2]
Prints one JSON line a compute dtype: the bound (measured matmul rate over the step's arithmetic), the peer, ours (best
step of each, tokens/s), the ratios, and the peak resident memory of both. Then what it costs to have a rank a thread, its
base sharded, instead of one rank with all threads on the same two rows. Run it on a quiet machine.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
LENGTH = 512
SHAPE = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
             vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True)
LINEARS = 30 * 576 * (576 + 2 * 192 + 576 + 3 * 1536)
HEAD = 576 * 49152
ADAPTERS = 30 * 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))


def flops_per_token() -> float:
    """Forward and input gradient of the frozen matrices, causal attention, three products for the adapters."""
    attention = 2 * LENGTH * 576 * 30  # 4 c s d L with c = 1/2
    return 4 * (LINEARS + HEAD) + 3.5 * attention + 6 * ADAPTERS


def matmul_rate(dtype: str, threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    x, w = torch.randn(512, 576), torch.randn(1536, 576)
    if dtype == "bfloat16":
        x, w = x.bfloat16(), w.bfloat16()
    best = float("inf")
    for _ in range(50):
        start = time.perf_counter()
        torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
        best = min(best, time.perf_counter() - start)
    return 2 * 512 * 576 * 1536 / best


def run_peer(dtype: str, steps: int, threads: int) -> None:
    """In a process of its own, so that its peak memory is its own. Prints JSON."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    compute = getattr(torch, dtype)
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)
        quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                       bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute)
        model = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=compute)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0)
    ids = torch.randint(0, 49152, (1, LENGTH))
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"tokens_per_s": LENGTH / min(seconds),
                      "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def write_shard(path: pathlib.Path) -> None:
    import h5py
    import numpy

    rows, rng = 16, numpy.random.default_rng(0)
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.attrs.update({"graft_schema": 1, "kind": numpy.bytes_("tokens"), "num_samples": rows,
                           "created_by": numpy.bytes_("bench"), "tokenizer_sha256": numpy.bytes_("0" * 64),
                           "vocab_size": 49152})
        file["tokens"] = rng.integers(1, 49152, rows * LENGTH, dtype=numpy.uint32)
        file["offsets"] = numpy.arange(0, rows * LENGTH + 1, LENGTH, dtype=numpy.uint64)
        file["loss_mask"] = numpy.ones(rows * LENGTH, dtype=numpy.uint8)


def run_ours(dtype: str, steps: int, threads: int, ranks: int = 1, accumulation: int = 1) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        write_shard(pathlib.Path(folder) / "train.h5")
        (pathlib.Path(folder) / "run.yaml").write_text(f"""
schema: 1
model: {{name_or_path: {ROOT}/configs/models/smollm2_135m.yaml, weights: random, quantization: nf4, dtype: {dtype}}}
data: {{train: [{folder}/train.h5], max_length: {LENGTH}}}
peft: [{{method: lora, r: 16, lora_alpha: 32, target_modules: all-linear}}]
train: {{max_steps: {steps}, gradient_accumulation_steps: {accumulation}}}
parallel: {{threads_per_rank: {threads}}}
checkpoint: {{output_dir: {folder}/run, save_steps: 0}}
""")
        program = os.environ.get("GRAFT_BINARY_DIR", ROOT / "build/release")
        launcher = [f"{ROOT}/cluster/mpirun.sh", "-np", str(ranks)] if ranks > 1 else []
        subprocess.run([*launcher, f"{program}/graft", "train", f"{folder}/run.yaml"], check=True, stderr=subprocess.DEVNULL)
        lines = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl", encoding="utf-8")]
    return {"tokens_per_s": LENGTH * ranks * accumulation / min(line["step_ms"] for line in lines) * 1000,
            "peak_bytes": max(line["peak_memory_bytes"] for line in lines)}


def compare_ranks(steps: int, threads: int) -> None:
    """A rank a thread against one rank with all threads: the same rows a step, sharded against whole."""
    one = run_ours("float32", steps, threads, accumulation=threads)
    many = run_ours("float32", steps, 1, ranks=threads)
    print(json.dumps({"row": f"{threads} ranks x 1 thread, {threads} x {LENGTH} tokens a step, float32", "unit": "tokens/s",
                      f"1 rank x {threads} threads": round(one["tokens_per_s"], 1),
                      "ours": round(many["tokens_per_s"], 1),
                      "ours/1 rank": round(many["tokens_per_s"] / one["tokens_per_s"], 2),
                      "our peak MiB a rank": many["peak_bytes"] >> 20}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", choices=["float32", "bfloat16"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        run_peer(arguments.peer, arguments.steps, arguments.threads)
        return
    for dtype in ("float32", "bfloat16"):
        ours = run_ours(dtype, arguments.steps, arguments.threads)
        command = [sys.executable, __file__, "--peer", dtype, "--steps", str(arguments.steps), "--threads", str(arguments.threads)]
        peer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        limit = matmul_rate(dtype, arguments.threads) / flops_per_token()
        print(json.dumps({"row": f"train step, SmolLM2-135M shape, 1 x {LENGTH}, LoRA r16, NF4, {dtype}",
                          "unit": "tokens/s", "limit": round(limit, 1), "peer": round(peer["tokens_per_s"], 1),
                          "ours": round(ours["tokens_per_s"], 1), "ours/limit": round(ours["tokens_per_s"] / limit, 2),
                          "ours/peer": round(ours["tokens_per_s"] / peer["tokens_per_s"], 2),
                          "peer peak MiB": peer["peak_bytes"] >> 20, "our peak MiB": ours["peak_bytes"] >> 20}), flush=True)
    compare_ranks(arguments.steps, arguments.threads)


if __name__ == "__main__":
    main()
