#!/usr/bin/env python3
"""Loads adapters that Graft wrote into Hugging Face PEFT and compares the logits with Graft's own.

    check_peft.py --model MODEL_DIR --rows ROWS.h5 RUN_DIR...

RUN_DIR holds adapter/ (PEFT layout) and logits.safetensors, as `graft eval --logits` wrote it for the rows of ROWS.h5:
row.0 [L, V], row.1 ... float32. A model quantised by bitsandbytes is dequantised first, because its CPU forward rounds.
Passes when every logit agrees to --tolerance and the adapter changes them by more than ten times that.
"""

import argparse
import json
import pathlib
import sys
import warnings

import h5py
import peft
import torch
import transformers
from safetensors.torch import load_file


def read_rows(path):
    with h5py.File(path) as file:
        tokens, offsets = file["tokens"][:], file["offsets"][:]
    return [torch.tensor(tokens[a:b].astype("int64"))[None] for a, b in zip(offsets, offsets[1:])]


def load_base(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, device_map="cpu",
                                                              attn_implementation="eager")
    return (model.dequantize() if model.config.__dict__.get("quantization_config") else model).eval()


def logits_of(model, rows):
    """One [L, V] for each row; a prompt method returns its prompt's positions too, in front."""
    with torch.no_grad():
        return [model(input_ids=row).logits[0, -row.shape[1]:] for row in rows]


def largest_difference(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def check(model_directory, rows, run, tolerance):
    """What is wrong with this run, or an empty string."""
    base = load_base(model_directory)
    untouched = logits_of(base, rows)
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    base.config.use_cache = config["peft_type"] != "XLORA"  # which asks for it
    theirs = logits_of(peft.PeftModel.from_pretrained(base, run / "adapter").eval(), rows)
    saved = load_file(run / "logits.safetensors")
    ours = [saved[f"row.{i}"] for i in range(len(saved))]
    difference, change = largest_difference(ours, theirs), largest_difference(untouched, theirs)
    print(f"{run.name}: differs from PEFT by {difference:.2e}; the adapter changes logits by {change:.2e}")
    if not difference <= tolerance:
        return f"{run}: logits differ by {difference:.2e}, allowed {tolerance:.0e}"
    if not change > 10 * tolerance:
        return f"{run}: the adapter changes nothing, so the comparison shows nothing"
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True, metavar="MODEL_DIR")
    parser.add_argument("--rows", type=pathlib.Path, required=True, metavar="ROWS.h5")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("runs", type=pathlib.Path, nargs="+", metavar="RUN_DIR")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("error", message=".*missing adapter keys.*")
    rows = read_rows(arguments.rows)
    problems = [check(arguments.model, rows, run, arguments.tolerance) for run in arguments.runs]
    sys.exit("\n".join(filter(None, problems)) or 0)


if __name__ == "__main__":
    main()
