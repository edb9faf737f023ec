"""LoRA that starts from the base's matrices or from data: the same bits at any rank count and after a resume, files that
HF PEFT reads on the untouched base, and what else may be done with such an adapter."""

from __future__ import annotations

import json
import sys
import warnings

import peft
import pytest
from graft_cli import LENGTHS, ORACLE, ROOT, adapter, graft, lanes, succeed, write_config, write_rows
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "tests/oracle"))
import check_peft  # noqa: E402

TOLERANCE = 1e-5  # of the largest logit
STARTS = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4", "use_rslora": True, "rank_pattern": {"v_proj": 3}},
    "olora": {"init_lora_weights": "olora"},
    "mica": {"init_lora_weights": "mica"},
    "eva": {"init_lora_weights": "eva", "eva_config": {"use_label_mask": False}},
    "corda": {"init_lora_weights": "corda"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "dora_pissa": {"method": "dora", "init_lora_weights": "pissa"},
}
QUANTISED = STARTS | {"loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 3}}}
CHANGES_BASE = ["pissa", "pissa_niter", "olora", "corda", "lora_ga", "dora_pissa"]


@pytest.fixture
def config(tmp_path):
    """config(fields, override...) -> a run in a folder of its own."""
    write_rows(tmp_path / "rows.h5", LENGTHS)

    def call(name, fields, *overrides):
        (tmp_path / name).mkdir(exist_ok=True)
        entry = {"method": "lora", "r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | fields
        return write_config(tmp_path / name / "run.yaml", tmp_path / "rows.h5", f"peft=[{json.dumps(entry)}]", *overrides)
    return call


@pytest.mark.parametrize("start", QUANTISED)
def test_ranks_and_a_resume_change_no_bit(start, config, tmp_path):
    for ranks in 1, 2, 4:
        succeed("train", config(f"ranks-{ranks}", QUANTISED[start], lanes(ranks)), ranks=ranks)
    for steps in 2, 4:
        succeed("train", config("resumed", QUANTISED[start], f"train.max_steps={steps}"))
    expected = adapter(tmp_path / "ranks-1/run")
    for name in "ranks-2", "ranks-4", "resumed":
        assert adapter(tmp_path / name / "run") == expected, name


@pytest.mark.parametrize("start", STARTS)
def test_peft_computes_our_logits_on_the_untouched_base(start, config, tmp_path):
    model, rows = ORACLE / "qwen2/model", ORACLE / "qwen2/rows.h5"
    path = config("run", STARTS[start], f'model.name_or_path="{model}"', 'model.quantization="none"', "data.packing=false",
                  f'data.train=["{rows}"]', f'data.eval=["{rows}"]', "train.learning_rate=0.03")
    succeed("train", path)
    succeed("eval", path, "--logits", tmp_path / "logits.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(check_peft.load_base(model), tmp_path / "run/run/adapter").eval()
    documents = check_peft.read_rows(rows)
    theirs, untouched = (check_peft.logits_of(m, documents) for m in (theirs, check_peft.load_base(model)))
    saved = load_file(tmp_path / "logits.safetensors")
    ours = [saved[f"row.{i}"] for i in range(len(documents))]
    size = max(logits.abs().max().item() for logits in theirs)
    assert check_peft.largest_difference(ours, theirs) < TOLERANCE * size
    assert check_peft.largest_difference(untouched, theirs) > 1e-2 * size


@pytest.mark.parametrize("start", CHANGES_BASE)
def test_merged_and_started_from_it_is_the_same_model(start, config, tmp_path):
    dense = 'model.quantization="none"'
    first = config("first", STARTS[start], dense)
    succeed("train", first)
    directory = tmp_path / "first/run/adapter"
    succeed("eval", first, "--logits", tmp_path / "expected.safetensors")
    succeed("merge", "--model", json.loads(first.read_text())["model"]["name_or_path"], "--adapter", directory,
            "--output", tmp_path / "merged")
    merged = config("merged-run", {}, dense, f'model.name_or_path="{tmp_path / "merged"}"')
    succeed("eval", merged, "--base", "--logits", tmp_path / "merged.safetensors")
    entry = f'peft=[{{"init_from": "{directory}"}}]'
    again = config("again", {}, dense, entry, "train.max_steps=1", "train.learning_rate=1e-30")
    succeed("train", again)
    succeed("eval", again, "--logits", tmp_path / "again.safetensors")
    expected = load_file(tmp_path / "expected.safetensors")
    size = max(row.abs().max().item() for row in expected.values())
    for other in "merged", "again":
        rows = load_file(tmp_path / f"{other}.safetensors")
        assert max((rows[key] - expected[key]).abs().max().item() for key in expected) < TOLERANCE * size, other


@pytest.mark.parametrize("start", CHANGES_BASE)
def test_a_base_that_is_quantised_in_its_file_is_refused(start, config):
    done = graft("train", config("run", STARTS[start], f'model.name_or_path="{ORACLE / "llama_nf4/model"}"'))
    assert done.returncode == 2, done.stderr
    assert "stored in four bits" in done.stderr and "model.quantization: nf4" in done.stderr


def test_eva_starts_on_a_base_that_is_quantised_in_its_file(config):
    succeed("train", config("run", STARTS["eva"], f'model.name_or_path="{ORACLE / "llama_nf4/model"}"'))
