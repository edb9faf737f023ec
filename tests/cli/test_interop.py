"""Adapters both ways between Graft and Hugging Face PEFT, on every tiny model and on a 4-bit file of bitsandbytes.

Oracles: PEFT itself (tests/oracle/check_peft.py), and the numbers of tests/oracle/make_fixtures.py.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings

import peft
import pytest
import torch
from graft_cli import ORACLE, ROOT, adapter, graft, losses, succeed, write_config
from safetensors.torch import load_file, save_file

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
def test_peft_loads_what_graft_trained_without_a_warning(config, case, tmp_path):
    succeed("train", config(case, "train.max_steps=1"))
    base = check_peft.load_base(ORACLE / case / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.PeftModel.from_pretrained(base, tmp_path / "run/adapter")


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


# --- adapters that PEFT writes here and now: it computes the expected logits from the same directory

QWEN = "qwen2"  # biases and an untied head


@pytest.fixture
def saved(tmp_path):
    """saved(case, **fields) -> a directory of PEFT's with random values, for LoraConfig(**fields)."""
    def call(case, **fields):
        directory = tmp_path / "foreign"
        shutil.rmtree(directory, ignore_errors=True)
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(check_peft.load_base(ORACLE / case / "model"),
                                        peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **fields))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter) * parameter.requires_grad)
            model.save_pretrained(directory)
        return directory
    return call


def change_config(directory, **entries):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))  # in this order


def change_tensors(directory, **tensors):
    path = directory / "adapter_model.safetensors"
    save_file(load_file(path) | tensors, path)


def expect_pefts_logits(config, case, directory, tmp_path):
    rows = check_peft.read_rows(ORACLE / case / "rows.h5")
    base = check_peft.load_base(ORACLE / case / "model")
    untouched = check_peft.logits_of(base, rows)
    expected = check_peft.logits_of(peft.PeftModel.from_pretrained(base, directory).eval(), rows)
    file = tmp_path / "logits.safetensors"
    succeed("eval", config(case), "--adapter", directory, "--logits", file)
    assert largest_difference(file, expected) < LOGITS_TOLERANCE
    assert check_peft.largest_difference(untouched, expected) > 10 * LOGITS_TOLERANCE


def expect_data_error(config, case, directory, *words):
    result = graft("eval", config(case), "--adapter", directory)
    assert result.returncode == 3 and all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize("fields", [
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": ".*q_proj"},
    {"target_modules": "all-linear", "exclude_modules": r".*down_proj"},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"layers\.[01]\..*q_proj": 8}},
    {"target_modules": ["q_proj"], "rank_pattern": {"^model.layers.0.self_attn.q_proj": 8}, "use_rslora": True},
    {"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 8}, "alpha_pattern": {"nothing": 1}},
    {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [0]},
    {"target_modules": ["k_proj"], "r": 64},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "lm_head", "no_such_module"]},
], ids=str)
def test_what_peft_loads_graft_loads(config, saved, fields, tmp_path):
    expect_pefts_logits(config, QWEN, saved(QWEN, **{"r": 4, "lora_alpha": 8} | fields), tmp_path)


@pytest.mark.parametrize("fields", [
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj", "lm_head"]},
], ids=str)
def test_what_peft_loads_on_a_tied_base_graft_loads(config, saved, fields, tmp_path):
    expect_pefts_logits(config, "llama_tied", saved("llama_tied", r=4, lora_alpha=8, **fields), tmp_path)


@pytest.mark.parametrize("pattern", [
    {"model.layers.1.*q_proj": 64},
    {"1.self_attn.q_proj": 64, "layers.1.self_attn.q_proj": 1},
    {"layers.1.self_attn.q_proj": 1, "1.self_attn.q_proj": 64},
    {"v_proj": 64, "q_proj": 1, ".*": 32},
    {"all-linear": 64},
    {"attn.q": 64},
    {"model.layers.*": 64},
    {r"layers\.\d\..*(q|k)_proj$": 32},
], ids=str)
def test_patterns_mean_what_they_mean_to_peft(config, saved, pattern, tmp_path):
    directory = saved(QWEN, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    change_config(directory, alpha_pattern=pattern)
    expect_pefts_logits(config, QWEN, directory, tmp_path)


@pytest.mark.parametrize("key", ["*q_proj", "(q_proj", "(a+)+\\1", "q" * 600], ids=lambda key: key[:20])
def test_a_pattern_that_is_none_is_a_data_error(config, saved, key):
    directory = saved(QWEN, r=4, lora_alpha=8, target_modules=["q_proj"])
    change_config(directory, alpha_pattern={key: 64})
    expect_data_error(config, QWEN, directory, "the pattern '")


@pytest.mark.parametrize("case, module", [(QWEN, "model.layers.0.self_attn.q_proj"), (QWEN, "lm_head"),
                                          (QWEN, "model.layers.1.mlp.up_proj")])
def test_a_matrix_that_peft_would_load_over_the_base_is_refused(config, saved, case, module):
    directory = saved(case, r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"])
    key = f"base_model.model.{module}.base_layer.weight"
    matrix = check_peft.load_base(ORACLE / case / "model").get_submodule(module).weight.detach()
    change_tensors(directory, **{key: matrix + 0.01})
    expect_data_error(config, case, directory, key)
    result = graft("merge", "--model", ORACLE / case / "model", "--adapter", directory,
                   "--output", directory.parent / "merged")
    assert result.returncode == 3 and key in result.stderr, result.stderr


@pytest.mark.parametrize("entries", [{"r": 4294967300}, {"r": 4.7}, {"r": True}, {"lora_alpha": 1e308},
                                     {"lora_alpha": True}], ids=str)
def test_a_number_that_is_none_is_a_data_error(config, saved, entries):
    directory = saved(QWEN, r=4, lora_alpha=8, target_modules=["q_proj"])
    change_config(directory, **entries)
    expect_data_error(config, QWEN, directory, "adapter_config.json", list(entries)[-1])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.uint64, torch.complex64, torch.int8,
                                   torch.bool], ids=str)
def test_tensors_that_are_no_floats_are_a_data_error(config, saved, dtype):
    directory = saved(QWEN, r=4, lora_alpha=8, target_modules=["q_proj"])
    key, value = next(iter(load_file(directory / "adapter_model.safetensors").items()))
    change_tensors(directory, **{key: torch.zeros(value.shape, dtype=dtype)})
    expect_data_error(config, QWEN, directory, key)
    inspected = graft("inspect", directory)
    assert inspected.returncode == 3 and key in inspected.stdout + inspected.stderr
