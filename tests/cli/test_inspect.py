"""graft inspect: what is in a file, and what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import h5py
import numpy as np
import pytest
from graft_cli import GRAFT, ORACLE, write_config
from safetensors.numpy import load_file, save_file
from tiny_base import LAYERS, LORA, VOCABULARY, facts, run, write_adapter, write_gguf


def unsound(*arguments):
    """The facts about what is not sound."""
    done = subprocess.run([GRAFT, "inspect", *arguments, "--json"], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    return json.loads(done.stdout)


def test_inspect_adapter(adapter, tmp_path):
    found = facts("inspect", adapter)
    assert (found["kind"], found["r"], found["lora_alpha"], found["health"]) == ("adapter", 4, 6, "good")
    assert (found["method"], found["created_by"]) == ("lora", "PEFT, or in its layout")
    assert found["parameters"] == sum(t.size for t in load_file(adapter / "adapter_model.safetensors").values())
    untrained = unsound(write_adapter(tmp_path / "zero", zero_b=True))
    assert untrained["zero_products"] == LAYERS * len(LORA["target_modules"])
    assert untrained["health"][0].startswith("loads without effect")
    part = write_adapter(tmp_path / "part")
    tensors = load_file(part / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][:] = 0
    save_file(tensors, part / "adapter_model.safetensors")
    assert facts("inspect", part)["health"].startswith("good; where the product is zero")


def test_inspect_names_a_type_that_no_method_has(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "NO_SUCH", "peft_version": "0.21.2"}))
    found = unsound(adapter)
    assert found["method"] is None and found["created_by"] == "PEFT 0.21.2"
    assert "peft_type 'NO_SUCH' is not supported; known: " in found["health"][0] and "LORA" in found["health"][0]


# One method a kind of slot, and those whose start is not zeros: what is saved unmoved does nothing.
@pytest.mark.parametrize("method", ["lora", "oft", "dora", "ia3", "bitfit", "layernorm_tuning", "llama_adapter", "bottleneck", "prompt_tuning"])
def test_with_its_base_inspect_says_whether_an_adapter_of_any_type_does_anything(method, tmp_path):
    model = ORACLE / "qwen2/model"
    for rate in (1e-30, 1e-1):
        folder = tmp_path / str(rate)
        folder.mkdir()
        config = write_config(folder / "run.yaml", ORACLE / "qwen2/rows.h5", f'model.name_or_path="{model}"', f'peft=[{{"method": "{method}"}}]',
                              "train.max_steps=1", f"train.learning_rate={rate}")
        run("train", config)
        adapter = folder / "run/adapter"
        starts_as_base = facts("methods", method)["starts_as_base"]
        found = unsound(adapter, "--model", model) if rate < 1e-3 and starts_as_base else facts("inspect", adapter, "--model", model)
        assert found["method"] == method and found["created_by"].startswith("graft ")
        assert found["on_model"]["base_fingerprint"] == found["graft"]["base_fingerprint"]
        change = found["on_model"]["largest_change_of_a_logit"]
        assert (change == 0) == (rate < 1e-3 and starts_as_base)
        assert (found["health"][-1] == "loads without effect: the logits are the base's") == (change == 0)


def test_the_bias_of_a_lora_has_no_partner(tmp_path):
    path = write_config(tmp_path / "run.yaml", ORACLE / "qwen2/rows.h5", f'model.name_or_path="{ORACLE / "qwen2/model"}"',
                        'peft=[{"method": "lora", "lora_bias": true}]', "train.max_steps=1")
    run("train", path)
    assert facts("inspect", tmp_path / "run/adapter")["health"] == "good"


def test_with_a_base_inspect_finds_what_does_not_fit(model, adapter, tmp_path):
    assert facts("inspect", adapter, "--model", model)["on_model"]["largest_change_of_a_logit"] > 0
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors, weights, {"graft": json.dumps({"method": "lora", "base_fingerprint": "another"})})
    found = unsound(adapter, "--model", model)
    assert any(f"fingerprint another, this one has {found['on_model']['base_fingerprint']}" in line for line in found["health"])
    gone, strange = (f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_B.weight" for i in (0, 7))
    tensors[strange] = tensors.pop(gone)
    save_file(tensors, weights)
    health = "\n".join(unsound(adapter, "--model", model)["health"])
    assert f"missing: {gone}" in health and f"unknown: {strange}" in health
    assert "--model is for adapters" in run("inspect", model, "--model", model, code=2)


def test_inspect_finds_what_is_wrong_with_an_adapter(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    gone, spoilt = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    del tensors[gone]
    tensors[spoilt][0, 0] = np.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert sorted(unsound(adapter)["health"]) == sorted([f"missing: {gone}", f"not finite: {spoilt}"])


def test_inspect_model_folder_and_gguf(model, tmp_path):
    found = facts("inspect", model)
    assert (found["kind"], found["model_type"], found["tokenizer"]) == ("model folder", "llama", True)
    assert found["tensors"] == {"F32": 3 + 9 * LAYERS}
    tensors = load_file(model / "model.safetensors")
    listed = facts("inspect", write_gguf(tmp_path / "m.gguf", tensors))
    assert (listed["kind"], listed["parameters"], listed["tokenizer"]) == ("GGUF model", found["parameters"], False)
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors")
    assert "model.norm.weight" in run("inspect", model, code=3)


def test_inspect_shard_reads_all_of_it(tmp_path):
    shard = tmp_path / "rows.h5"
    shutil.copy(ORACLE / "llama_tied/rows.h5", shard)
    found = facts("inspect", shard)
    assert (found["samples"], found["tokens"], found["longest_sample"]) == (2, 48, 24)
    assert found["target_tokens"] == 48 - 6 - 4 and found["target_share"] == pytest.approx(38 / 48)
    shard.write_bytes(shard.read_bytes()[:-200])
    assert str(shard) in run("inspect", shard, code=3)


def test_inspect_checkpoint_verifies_the_manifest(model, tmp_path):
    with h5py.File(tmp_path / "rows.h5", "w") as rows:
        rows.attrs.update(graft_schema=1, kind="tokens", num_samples=2, created_by="test", tokenizer_sha256="0" * 64, vocab_size=VOCABULARY)
        rows["tokens"], rows["offsets"] = np.arange(20, dtype=np.uint32), np.array([0, 8, 20], np.uint64)
        rows["loss_mask"] = np.ones(20, np.uint8)
    (tmp_path / "run.yaml").write_text(json.dumps({
        "schema": 1, "model": {"name_or_path": str(model), "quantization": "none"}, "peft": [{"method": "lora", "r": 4}],
        "data": {"train": [str(tmp_path / "rows.h5")], "max_length": 16}, "train": {"max_steps": 2},
        "checkpoint": {"output_dir": str(tmp_path / "run"), "save_steps": 2}}))
    run("train", tmp_path / "run.yaml")
    checkpoint = tmp_path / "run/checkpoints/step-00000002"
    found = facts("inspect", checkpoint)
    assert (found["kind"], found["step"], found["world"], found["adapter"]["r"]) == ("checkpoint", 2, 1, 4)
    adapter = facts("inspect", tmp_path / "run/adapter")
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert adapter["graft"] == {"method": "lora", "base_fingerprint": record["base_fingerprint"], "created_by": adapter["created_by"],
                                "lora_fa": False, "lora_fa_gradient": "projected", "loraplus_lr_ratio": 1.0,
                                "loraplus_lr_embedding": 1e-6, "calibration_samples": 64}  # what PEFT's config does not know
    assert adapter["zero_products"] == 0
    config_file = checkpoint / "config.yaml"
    config_file.write_bytes(config_file.read_bytes()[:-2] + b"!\n")
    done = subprocess.run([GRAFT, "inspect", checkpoint], capture_output=True, text=True)
    assert done.returncode == 3 and "config.yaml has another hash" in done.stdout


def test_a_checkpoint_without_manifest_is_not_sound(adapter):
    (adapter / "trainer.json").write_text("{}")
    done = subprocess.run([GRAFT, "inspect", adapter], capture_output=True, text=True)
    assert done.returncode == 3 and "MANIFEST.json" in done.stdout


def test_inspect_says_what_it_expects(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bad.h5").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "missing"):
        assert "token shard (.h5)" in run("inspect", path, code=3)
    assert "bad.h5" in run("inspect", tmp_path / "bad.h5", code=3)


def test_a_pipe_nobody_writes_to_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in run("inspect", tmp_path / "pipe", code=3)
    assert "is a pipe" in run("validate", tmp_path / "pipe", code=2)
