"""An adapter knows the base it was trained on: every verb that puts one on a model compares fingerprints."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_base import VOCABULARY, run, write_gguf


@pytest.fixture
def trained(model, tmp_path):
    """The file of a run of two steps on `model`; its adapter is beside it in run/adapter."""
    with h5py.File(tmp_path / "rows.h5", "w") as rows:
        rows.attrs.update(graft_schema=1, kind="tokens", num_samples=2, created_by="test", tokenizer_sha256="0" * 64, vocab_size=VOCABULARY)
        rows["tokens"], rows["offsets"] = np.arange(20, dtype=np.uint32), np.array([0, 8, 20], np.uint64)
        rows["loss_mask"] = np.ones(20, np.uint8)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({
        "schema": 1, "model": {"name_or_path": str(model), "quantization": "none"}, "peft": [{"method": "lora", "r": 4}],
        "data": {"train": [str(tmp_path / "rows.h5")], "eval": [str(tmp_path / "rows.h5")], "max_length": 16},
        "train": {"max_steps": 2}, "checkpoint": {"output_dir": str(tmp_path / "run"), "save_steps": 0}}))
    run("train", path)
    return path


def change(model):
    """Another base of the same shape: one number of one matrix."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, model / "model.safetensors")


def commands(config, model, folder):
    adapter, output = folder / "run/adapter", folder / "out"
    return {"eval": (["eval", config, "--adapter", adapter], "model.any_base=true"),
            "merge": (["merge", "--model", model, "--adapter", adapter, "--output", output], "--any-base"),
            "export": (["export", "--model", model, "--adapter", adapter, "--to", "gguf", "--output", output], "--any-base"),
            "adapters": (["train", config, f"model.adapters=[{adapter}]", f"checkpoint.output_dir={output}"], "model.any_base=true"),
            "init_from": (["train", config, f"peft=[{{init_from: {adapter}}}]", f"checkpoint.output_dir={output}"], "model.any_base=true")}


@pytest.mark.parametrize("verb", ["eval", "merge", "export", "adapters", "init_from"])
def test_an_adapter_of_another_base_is_refused_with_both_fingerprints(trained, model, tmp_path, verb):
    mine = json.loads((tmp_path / "run/run.json").read_text())["base_fingerprint"]
    command, go_on = commands(trained, model, tmp_path)[verb]
    run(*command)
    if (tmp_path / "out").exists():
        (tmp_path / "out").rename(tmp_path / "first")
    change(model)
    said = run(*command, code=3)
    run("eval", trained, "--base")
    now = json.loads((tmp_path / "run/eval.json").read_text())["base_fingerprint"]
    assert now != mine and f"fingerprint {mine}" in said and f"this one has {now}" in said and "--any-base" in said
    assert not (tmp_path / "out").exists()
    run(*command, go_on)


def test_generate_compares_too(model, adapter, tmp_path):
    source = write_gguf(tmp_path / "m.gguf", load_file(model / "model.safetensors"), tokenizer=True)
    command = ["generate", "--model", source, "--adapter", adapter, "--prompt", "cab", "--max-new-tokens", 2]
    run(*command)
    weights = adapter / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"graft": json.dumps({"method": "lora", "base_fingerprint": "another"})})
    assert f"{adapter}: was trained on a base with fingerprint another" in run(*command, code=3)
    run(*command, "--any-base")


def test_an_adapter_without_a_fingerprint_passes(trained, model, adapter, tmp_path):
    change(model)
    run("eval", trained, "--adapter", adapter)
