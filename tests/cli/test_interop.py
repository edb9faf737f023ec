"""Adapters both ways between Graft and Hugging Face PEFT, on every tiny model and on a 4-bit file of bitsandbytes.

Oracles: PEFT itself (tests/oracle/check_peft.py), and the numbers of tests/oracle/make_fixtures.py.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch
from graft_cli import ORACLE, ROOT, adapter, losses, succeed, write_config
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "tests/oracle"))
import check_peft  # noqa: E402

CASES = sorted(path.name for path in ORACLE.iterdir() if (path / "oracle.json").exists())
LOGITS_TOLERANCE = 1e-4  # float32 sums in another order


def quantization_of(case):
    return "nf4" if case.endswith("nf4") else "none"


@pytest.fixture
def config(tmp_path):
    """config(case, override...) -> a run on that case's model and rows, two rows a step as the oracle has them."""
    def call(case, *overrides):
        folder = ORACLE / case
        return write_config(tmp_path / "run.yaml", folder / "rows.h5", f'model.name_or_path="{folder / "model"}"',
                            f'model.quantization="{quantization_of(case)}"', "data.shuffle=false", "data.packing=false",
                            "train.gradient_accumulation_steps=1", "train.per_device_train_batch_size=2", *overrides)
    return call


def start_from(case, fields=""):
    return f'peft=[{{{fields}"init_from": "{ORACLE / case / "adapter"}"}}]'


def largest_difference(file, expected):
    rows = load_file(file)
    assert set(rows) == {f"row.{i}" for i in range(len(expected))}
    return max((rows[f"row.{i}"] - expected[i]).abs().max().item() for i in range(len(expected)))


def test_there_is_a_case_for_every_kind_of_base():
    assert len(CASES) >= 6 and any(case.endswith("nf4") for case in CASES)


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_graft_trained_and_computes_its_logits(config, case, tmp_path):
    path = config(case)
    succeed("train", path)
    run = tmp_path / "run"
    succeed("eval", path, "--logits", run / "logits.safetensors")
    rows = check_peft.read_rows(ORACLE / case / "rows.h5")
    assert check_peft.check(ORACLE / case / "model", rows, run, LOGITS_TOLERANCE) == ""


@pytest.mark.parametrize("case", CASES)
def test_graft_loads_what_peft_wrote_and_computes_its_logits(config, case, tmp_path):
    """Four ways to it: a frozen adapter under nothing, the start of a training with and without fields, --adapter."""
    expected = load_file(ORACLE / case / "oracle.safetensors")["adapter_logits"]
    directory = ORACLE / case / "adapter"
    fields = '"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", '
    for number, (overrides, flags) in enumerate([([f'model.adapters=["{directory}"]', "peft=[]", "data.train=[]"], []),
                                                 ([start_from(case)], []),
                                                 ([start_from(case, fields)], []),
                                                 ([], ["--adapter", directory])]):
        file = tmp_path / f"logits-{number}.safetensors"
        succeed("eval", config(case, *overrides), *flags, "--logits", file)
        assert largest_difference(file, expected) < LOGITS_TOLERANCE
    assert largest_difference(file, load_file(ORACLE / case / "oracle.safetensors")["logits"]) > 10 * LOGITS_TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_the_untouched_base_has_the_logits_of_transformers(config, case, tmp_path):
    succeed("eval", config(case), "--base", "--logits", tmp_path / "base.safetensors")
    assert largest_difference(tmp_path / "base.safetensors",
                              load_file(ORACLE / case / "oracle.safetensors")["logits"]) < LOGITS_TOLERANCE


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("clip, key", [("0.0", "losses"), ("1.0", "losses_max_grad_norm_1")])
def test_ten_steps_from_pefts_adapter_have_the_losses_of_torch(config, case, clip, key):
    oracle = json.loads((ORACLE / case / "oracle.json").read_text())["train"]
    path = config(case, start_from(case), "train.max_steps=10", f"train.max_grad_norm={clip}",
                  f'train.learning_rate={oracle["learning_rate"]}')
    succeed("train", path)
    assert losses(path.parent / "run") == pytest.approx(oracle[key], rel=1e-4)


def test_training_with_a_frozen_adapter_below_leaves_that_one_alone(config, tmp_path):
    """The new adapter starts at zero, so the first loss is the frozen adapter's; only the new one is saved."""
    directory = ORACLE / "qwen2" / "adapter"
    path = config("qwen2", f'model.adapters=["{directory}"]')
    succeed("train", path)
    oracle = json.loads((ORACLE / "qwen2/oracle.json").read_text())
    assert losses(tmp_path / "run")[0] == pytest.approx(oracle["adapter_loss"], rel=1e-5)
    frozen, trained = load_file(directory / "adapter_model.safetensors"), load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert frozen.keys() == trained.keys()
    assert not any(torch.equal(frozen[name], trained[name]) for name in frozen)


def test_a_bitsandbytes_file_gives_the_same_bits_on_two_ranks(config, tmp_path):
    overrides = ["train.per_device_train_batch_size=1", "data.packing=true"]
    one = config("llama_nf4", *overrides, "train.gradient_accumulation_steps=2")
    succeed("train", one)
    first = adapter(tmp_path / "run")
    two = config("llama_nf4", *overrides, f'checkpoint.output_dir="{tmp_path / "two"}"')
    succeed("train", two, ranks=2)
    assert adapter(tmp_path / "two") == first
