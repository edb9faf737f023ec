"""graft export. Numbers come from numpy (alpha / r * B A), read back by the reference libraries (safetensors, gguf)."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_base import (HEADS, KEY_HEADS, LAYERS, LORA, VOCABULARY, WIDTH, facts, factors, run, to_gguf_rows, write_adapter,
                       write_model)

COPY = "base_model.model.lm_head.base_layer.weight"


@pytest.fixture
def with_copy(adapter, model):
    """with_copy(shift) -> the adapter, now with the base's head beside it as PEFT saves it, off by `shift`; its tensors."""
    tensors = load_file(adapter / "adapter_model.safetensors")

    def call(shift):
        copy = load_file(model / "model.safetensors")["lm_head.weight"] + np.float32(shift)
        save_file(tensors | {COPY: copy}, adapter / "adapter_model.safetensors", {"format": "pt", "graft": "{}"})
        return tensors
    return call


def test_export_peft_drops_copies_of_the_base_and_what_is_ours(adapter, model, with_copy, tmp_path):
    tensors = with_copy(shift=0)
    run("export", "--adapter", adapter, "--to", "peft", "--output", tmp_path / "out", "--model", model)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text()) == LORA
    with safe_open(tmp_path / "out/adapter_model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    assert found.keys() == tensors.keys() and all((found[k] == tensors[k]).all() for k in tensors)


@pytest.mark.parametrize("form", ["peft", "safetensors", "gguf"])
def test_a_copy_that_is_not_the_bases_matrix_is_refused(adapter, model, with_copy, tmp_path, form):
    with_copy(shift=1)
    said = run("export", "--adapter", adapter, "--to", form, "--output", tmp_path / "out", "--model", model, code=3)
    assert COPY in said and not (tmp_path / "out").exists()


def test_export_without_a_model_keeps_copies_of_the_base(adapter, with_copy, tmp_path):
    with_copy(shift=1)
    run("export", "--adapter", adapter, "--to", "peft", "--output", tmp_path / "out")
    found, before = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", adapter))
    assert found.keys() == before.keys() and all((found[k] == before[k]).all() for k in before)


def test_export_safetensors_carries_its_config(adapter, tmp_path):
    out = tmp_path / "lora.safetensors"
    run("export", "--adapter", adapter, "--to", "safetensors", "--output", out)
    size = int.from_bytes(out.read_bytes()[:8], "little")
    metadata = json.loads(out.read_bytes()[8:8 + size])["__metadata__"]
    assert json.loads(metadata["adapter_config"]) == LORA
    assert load_file(out).keys() == load_file(adapter / "adapter_model.safetensors").keys()
    assert facts("inspect", out)["kind"] == "safetensors file"


def gguf_lora(path):
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items() if "." in key and not key.startswith("GGUF")}
    return values, {t.name: np.array(t.data) for t in reader.tensors}


PATTERNS = {"use_rslora": True, "rank_pattern": {"model.layers.1.mlp.down_proj": 2}, "alpha_pattern": {"model.layers.0.self_attn.k_proj": 3}}


@pytest.mark.parametrize("changes", [{}, PATTERNS])
def test_export_gguf_is_the_same_change_in_llama_cpps_order(model, tmp_path, changes):
    adapter = write_adapter(tmp_path / "adapter", changes)
    out = tmp_path / "lora.gguf"
    run("export", "--adapter", adapter, "--to", "gguf", "--output", out, "--model", model)
    values, tensors = gguf_lora(out)
    assert values["general.type"] == "adapter" and values["adapter.type"] == "lora" and values["general.architecture"] == "llama"
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.down_proj": "ffn_down"}
    assert len(tensors) == 2 * LAYERS * len(names)
    for i in range(LAYERS):
        for hf, ours in names.items():
            path = f"model.layers.{i}.{hf}"
            a, b = factors(adapter, path)
            alpha = changes.get("alpha_pattern", {}).get(path, LORA["lora_alpha"])
            expected = alpha / (a.shape[0] ** 0.5 if changes.get("use_rslora") else a.shape[0]) * (b @ a)
            if ours != "ffn_down":
                expected = to_gguf_rows(expected, HEADS if ours == "attn_q" else KEY_HEADS)
            lora_a, lora_b = (tensors[f"blk.{i}.{ours}.weight.lora_{x}"] for x in "ab")
            found = values["adapter.lora.alpha"] / lora_a.shape[0] * (lora_b @ lora_a)  # llama-adapter.cpp: alpha / rank
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert facts("inspect", out)["kind"] == "GGUF adapter"


def test_export_gguf_refuses_what_llama_cpp_cannot_hold(model, tmp_path):
    whole = write_adapter(tmp_path / "whole", {"modules_to_save": ["lm_head"]})
    tensors = load_file(whole / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = np.zeros((VOCABULARY, WIDTH), np.float32)
    save_file(tensors, whole / "adapter_model.safetensors")
    said = run("export", "--adapter", whole, "--to", "gguf", "--output", tmp_path / "o.gguf", "--model", model, code=2)
    assert "base_model.model.lm_head.weight" in said
    tied = write_model(tmp_path / "tied", tied=True)
    head = write_adapter(tmp_path / "head", {"target_modules": ["lm_head"]}, {"lm_head": (VOCABULARY, WIDTH)})
    said = run("export", "--adapter", head, "--to", "gguf", "--output", tmp_path / "o.gguf", "--model", tied, code=2)
    assert "shares the embedding's table" in said and not (tmp_path / "o.gguf").exists()


@pytest.mark.parametrize("changes, said", [
    ({"lora_alpha": 1e-300}, "is 1e-300; llama.cpp needs"),
    ({"lora_alpha": 1e-30, "alpha_pattern": {"model.layers.1.mlp.down_proj": 1e30}}, "B of model.layers.1.mlp.down_proj times 1e+60"),
])
def test_export_gguf_refuses_scales_that_float32_cannot_hold(model, tmp_path, changes, said):
    adapter, out = write_adapter(tmp_path / "adapter", changes), tmp_path / "o.gguf"
    assert said in run("export", "--adapter", adapter, "--to", "gguf", "--output", out, "--model", model, code=7)
    assert not out.exists()


def test_export_says_what_it_needs(adapter, tmp_path):
    assert "--model" in run("export", "--adapter", adapter, "--to", "gguf", "--output", tmp_path / "o", code=2)
    run("export", "--adapter", adapter, "--to", "onnx", "--output", tmp_path / "o", code=2)
    assert "nothing is overwritten" in run("export", "--adapter", adapter, "--to", "peft", "--output", adapter, code=2)
    assert "adapter_config.json" in run("export", "--adapter", tmp_path, "--to", "peft", "--output", tmp_path / "o", code=3)
