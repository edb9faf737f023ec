"""graft export --as lora. PEFT loads what is written, on the plain base, and computes what it computes with the adapter
that it came from; both come from PEFT (tests/oracle/peft_methods.py)."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import peft
import pytest
import torch
from graft_cli import ORACLE, ROOT
from safetensors.numpy import load_file
from tiny_base import factors, run, write_adapter

sys.path.insert(0, str(ROOT / "tests/oracle"))
import check_peft  # noqa: E402
import peft_methods  # noqa: E402

BASE, TOLERANCE = ORACLE / "qwen2", 1e-5
peft_methods.prepare_peft()


def logits(*adapters):
    """Of PEFT, all rows in one; several adapters add up."""
    model = peft.PeftModel.from_pretrained(check_peft.load_base(BASE / "model"), adapters[0])
    for i, more in enumerate(adapters[1:]):
        model.load_adapter(more, f"more{i}")
    model.base_model.set_adapter(["default", *(f"more{i}" for i in range(len(adapters) - 1))])
    return torch.cat(check_peft.logits_of(model.eval(), check_peft.read_rows(BASE / "rows.h5")))


def convert(output, *adapters, rank=None, code=0, model=BASE / "model"):
    parts = [part for adapter in adapters for part in ("--adapter", adapter)]
    return run("export", *parts, "--to", "peft", "--as", "lora", "--model", model, "--output", output,
               *(["--rank", rank] if rank else []), code=code)


# Additive updates of a known rank: LoHa's r^2, LoKr's product of ranks, random projections' r, a LoRA's own.
@pytest.mark.parametrize("case, most", [("lora", 4), ("lora_patterns", 8), ("lora_rslora", 4), ("loha", 16), ("loha_head", 16), ("lokr_both", 64),
                                        ("vera", 64), ("delora", 4), ("adalora", 12)])
def test_a_mergeable_adapter_is_a_lora_of_its_rank(case, most, tmp_path):
    adapter = ORACLE / "peft_methods" / case
    said = convert(tmp_path / "lora", adapter)
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] <= most
    assert float(re.search(r"lost: ([\d.e+-]+) %", said)[1]) < 1e-10
    found, expected = logits(tmp_path / "lora"), logits(adapter)
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert (expected - logits_of_base()).abs().max() > 1e-3 * expected.abs().max()


def logits_of_base():
    return torch.cat(check_peft.logits_of(check_peft.load_base(BASE / "model"), check_peft.read_rows(BASE / "rows.h5")))


def test_a_stack_is_one_lora_of_the_sum_of_the_ranks(tmp_path):
    parts = [ORACLE / "peft_methods" / name for name in ("lora", "lora_rslora")]
    convert(tmp_path / "one", *parts)
    found, expected = logits(tmp_path / "one"), logits(*parts)
    assert json.loads((tmp_path / "one/adapter_config.json").read_text())["r"] <= 8
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_a_smaller_rank_is_the_nearest_and_its_error_is_stated(model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    said = convert(tmp_path / "half", adapter, rank=2, model=model)
    lost = change = 0.0
    tensors = load_file(tmp_path / "half/adapter_model.safetensors")
    for key in {name.split(".lora_")[0] for name in tensors}:
        path = key.removeprefix("base_model.model.")
        a, b = factors(adapter, path)
        whole = 6 / 4 * (b.astype(np.float64) @ a)
        half = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        assert tensors[f"{key}.lora_A.weight"].shape[0] == 2
        tail = np.linalg.svd(whole, compute_uv=False)[2:]
        assert np.linalg.norm(whole - half) == pytest.approx(np.linalg.norm(tail), rel=1e-4)
        lost, change = lost + (tail ** 2).sum(), change + (whole ** 2).sum()
    assert float(re.search(r"lost: ([\d.]+) %", said)[1]) == pytest.approx(100 * lost / change, rel=1e-2)


def test_what_no_lora_holds_is_refused_and_approximated_when_asked(tmp_path):
    adapter = ORACLE / "peft_methods/oft"
    assert "give --rank N" in convert(tmp_path / "no", adapter, code=2) and not (tmp_path / "no").exists()
    said = convert(tmp_path / "near", adapter, rank=8)
    assert "rank 8 to 8" in said and float(re.search(r"lost: ([\d.]+) %", said)[1]) > 0


def test_what_is_no_change_of_matrices_is_refused(tmp_path):
    for case in ("lora_bias", "ln_tuning"):
        said = convert(tmp_path / "no", ORACLE / "peft_methods" / case, code=2)
        assert "export: " in said and not (tmp_path / "no").exists()


def test_conversion_says_what_it_needs(adapter, tmp_path):
    base = ["export", "--adapter", adapter, "--to", "peft", "--output", tmp_path / "o"]
    assert "--as lora needs --model" in run(*base, "--as", "lora", code=2)
    assert "--rank is that of --as lora" in run(*base, "--rank", 4, code=2)
    assert "all as one with --as lora" in run(*base, "--adapter", adapter, code=2)
