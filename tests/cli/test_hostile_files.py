"""Files of strangers, whose headers hold or mean what no program writes, and outputs that would cost what is there."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess

import pytest
import torch
from graft_cli import GRAFT, ORACLE, graft, succeed, write_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_base import run

CASE = ORACLE / "llama_tied"
WEIGHTS = "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def config(tmp_path):
    shutil.copy(CASE / "rows.h5", tmp_path / "rows.h5")
    return write_config(tmp_path / "run.yaml", tmp_path / "rows.h5", 'model.quantization="none"')


@pytest.fixture
def theirs(tmp_path):
    return shutil.copytree(CASE / "adapter", tmp_path / "theirs")


# --- what a header says ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, said", [
    ("[" * 100_000, "levels deep"), ("{", "not valid JSON"), ("[]", "is no object"),
    ('{"method": 1}', "method is no text"), ('{"method": "lora", "base_fingerprint": 5}', "base_fingerprint is no text"),
    ('{"method": "lora", "created_by": {}}', "created_by is no text"),
    ('{"method": "lora", "labels": 1}', "labels is no list of texts"), ('{"method": "lora", "labels": [1]}', "labels is no list of texts"),
])
def test_facts_that_graft_would_not_write_are_refused_by_name(adapter, model, tmp_path, text, said):
    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS, {"graft": text})
    for arguments in (("inspect", adapter), ("merge", "--model", model, "--adapter", adapter, "--output", tmp_path / "merged")):
        message = run(*arguments, code=3)
        assert "metadata's entry graft" in message and said in message


def test_the_controls_of_a_terminal_in_a_file_are_not_printed(adapter, model):
    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS, {"graft": json.dumps({"method": "lora", "created_by": "a\x1b[2J\x9bb"})})
    said = run("inspect", adapter)
    assert "created_by: a?[2J?b" in said and "\x1b" not in said and "\x9b" not in said
    settings = json.loads((model / "config.json").read_text()) | {"model_type": "\x1b]0;x\x07"}
    (model / "config.json").write_text(json.dumps(settings))
    message = run("merge", "--model", model, "--adapter", adapter, "--output", model.parent / "merged", code=3)
    assert "?]0;x?" in message and "\x1b" not in message


# --- numbers -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, said", [
    (lambda t: t.double() + 1e300, f"not finite: {Q}"),
    (lambda t: t.to(torch.float8_e4m3fn), f"{Q} is F8_E4M3"),
    (lambda t: t.to(torch.complex64), f"{Q} is C64"),
    (lambda t: t.to(torch.uint64), f"{Q} is U64"),
])
def test_numbers_that_are_no_float32_are_named(adapter, model, tmp_path, change, said):
    tensors = load_file(adapter / WEIGHTS)
    save_file(tensors | {Q: change(tensors[Q])}, adapter / WEIGHTS)
    done = graft("inspect", adapter)
    assert done.returncode == 3 and said in done.stdout
    for arguments in (["merge"], ["export", "--as", "lora", "--to", "peft"]):
        assert said in run(*arguments, "--model", model, "--adapter", adapter, "--output", tmp_path / "out", code=3)


@pytest.mark.parametrize("change, said", [
    (lambda t: t.long() + (1 << 32), "out of range: "), (lambda t: t.to(torch.uint8).bool(), " is BOOL, expected I64, "),
    (lambda t: t.to(torch.complex64), " is C64, expected I64, "), (lambda t: t.float().to(torch.float8_e4m3fn), " is F8_E4M3, expected I64, "),
    (lambda t: t.long(), None),
])
@pytest.mark.parametrize("method, leaf", [("shira", "shira_indices"), ("fish_mask", "fish_places"), ("supertuning", "supertuning_indices")])
def test_places_are_integers_that_stay_what_they_are(tmp_path, config, method, leaf, change, said):
    more = {"supertuning": {"save_precomputed_indices": True}, "shira": {"r": 4}}.get(method, {})
    path = write_config(tmp_path / "train.yaml", CASE / "rows.h5", 'model.quantization="none"', "train.max_steps=1",
                        f"peft=[{json.dumps({'method': method} | more)}]")
    succeed("train", path)
    weights = tmp_path / "run/adapter" / WEIGHTS
    tensors = load_file(weights)
    name = next(key for key in tensors if leaf in key)
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    save_file(tensors | {name: change(tensors[name])}, weights, metadata)
    done = graft("eval", config, "--adapter", tmp_path / "run/adapter")
    assert done.returncode == (3 if said else 0), done.stderr
    assert said is None or (said in done.stderr and name in done.stderr)


def test_an_adapter_without_tensors_is_none(config, tmp_path):
    succeed("train", config, "train.max_steps=1", 'peft=[{method: linear_probe}]')
    adapter = tmp_path / "run/adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"modules_to_save": None}  # names no tensor that is missed
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with safe_open(adapter / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    save_file({}, adapter / WEIGHTS, metadata)
    done = graft("eval", config, "--adapter", adapter)
    assert done.returncode == 3 and "holds no tensors" in done.stderr


# --- what is written ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag", ["--output", "--logits"])
@pytest.mark.parametrize("name", ["run.yaml", "rows.h5", f"theirs/{WEIGHTS}", "theirs/new.json", "link"])
def test_eval_does_not_overwrite_what_it_measures(config, theirs, tmp_path, flag, name):
    (tmp_path / "link").symlink_to(config)
    before = {path: path.read_bytes() for path in (config, tmp_path / "rows.h5", theirs / WEIGHTS)}
    done = graft("eval", config, "--adapter", theirs, flag, tmp_path / name)
    assert done.returncode == 2 and "would overwrite what is measured" in done.stderr and "evaluating" not in done.stderr
    assert {path: path.read_bytes() for path in before} == before and not (theirs / "new.json").exists()


def test_eval_leaves_a_pipe_a_pipe(config, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    done = graft("eval", config, "--base", "--output", tmp_path / "pipe")
    assert done.returncode == 3 and "it is no regular file" in done.stderr and "evaluating" not in done.stderr
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_may_have_a_name_that_is_no_utf8(config, theirs, tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.rename(theirs, folder)
    done = subprocess.run([GRAFT, "eval", config, "--adapter", folder, "--json"], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["what"].endswith("\ufffd") and json.loads((tmp_path / "run/eval.json").read_text()) == record


def test_a_file_beyond_the_limit_is_told_and_goes_again(adapter, model, tmp_path):
    done = subprocess.run([GRAFT, "merge", "--model", model, "--adapter", adapter, "--output", tmp_path / "merged"], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)), timeout=60)
    assert done.returncode == 3 and "File too large" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]
