"""The help of every verb, and graft methods and models. Sizes are the published ones."""

from __future__ import annotations

import concurrent.futures
import os
import re

import pytest
from graft_cli import ROOT
from safetensors.numpy import load_file
from tiny_base import LORA, facts, run


@pytest.mark.parametrize("verb", ["train", "eval", "generate", "validate", "methods", "models", "inspect", "merge", "export", "fuse",
                                  "completion", "env"])
def test_help_fits_forty_lines_and_ends_with_two_examples(verb):
    lines = run(verb, "--help").rstrip().splitlines()
    assert len(lines) <= 40
    assert lines[-3] == "Examples:" and all("graft " + verb in line for line in lines[-2:])
    assert all("cluster/mpirun.sh -np" in line for line in lines if "mpirun" in line)


def test_methods_lists_every_line_of_the_manifest():
    manifest = re.findall(r"^METHOD\((\w+), (\w+)", (ROOT / "peft/methods.def").read_text(), re.M)
    assert [(m["name"], m["group"]) for m in facts("methods")["methods"]] == manifest
    text = run("methods")
    assert all(f"  {name} " in text and f"{group}:\n" in text for name, group in manifest)
    assert f"* **Methods** {len(manifest)} of them" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_method_shows_fields_families_and_forms():
    lora = facts("methods", "lora")
    assert lora["paper"] == "arXiv:2106.09685" and lora["peft_type"] == "LORA" and lora["mergeable"] is True
    assert "llama" in lora["families"] and lora["slots_by_default"] == ["attn.q", "attn.v"]
    assert lora["fields"]["r"] == {"type": "integer", "minimum": 1, "maximum": 4096, "description": "rank, the inner size", "default": 8}
    assert lora["exports_to"] == ["peft", "safetensors", "gguf", "merged model"]
    assert {"use_rslora", "init_from"} <= lora["fields"].keys() and "init_from" in run("methods", "lora")


def test_a_method_shows_what_depends_on_its_choices():
    lora, dora, prompt = (facts("methods", name) for name in ("lora", "dora", "prompt_tuning"))
    assert lora["starts_as_base"] is True and lora["storage"] == "R"
    assert set(lora["not_mergeable_with"]) >= {"lora_bias: true"}
    assert 'init_lora_weights: "false"' in lora["not_as_base_with"]
    assert 'init_lora_weights: "gaussian"' not in lora["not_as_base_with"]
    assert dora["mergeable"] is True
    assert prompt["mergeable"] is False and prompt["starts_as_base"] is False and "merged model" not in prompt["exports_to"]


def test_every_method_fits_a_family_and_is_counted_on_the_quickstarts_shape():
    names = [m["name"] for m in facts("methods")["methods"]]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        sheets = dict(zip(names, pool.map(lambda name: facts("methods", name), names)))
    for name, sheet in sheets.items():
        on = sheet["on_model"]
        asked = {"trainable_tokens": "token_indices", "xlora": "adapters"}.get(name)  # which ones, no default can know
        if asked:
            assert asked in on["does_not_fit"], on
            continue
        assert sheet["families"] and sheet["storage"] in "RSPN" and sheet["fields"], name
        if "does_not_fit" in on:  # vectors of 256 do not divide that width
            assert name == "vblora" and "256" in on["does_not_fit"], on
            continue
        assert on["model"].endswith("smollm2_135m.yaml") and on["base_parameters"] == 134_515_008, (name, on)
        assert (sheet["storage"] == "N") == (on["trained_parameters"] == 0), name
        assert (sheet["storage"] == "P") == (name in {"fish_mask", "shira", "supertuning"}), name


def test_a_method_counts_what_it_trains_on_a_model():
    shape = ROOT / "configs/models/tiny_llama.yaml"  # width 48, 6 heads of 16, 2 key heads, 2 layers
    trained = facts("methods", "lora", "--model", shape)["on_model"]["trained_parameters"]
    assert trained == 2 * 8 * ((48 + 6 * 16) + (48 + 2 * 16))


def test_an_unknown_method_is_answered_with_the_nearest():
    assert "did you mean 'lora'" in run("methods", "lroa", code=2)


def test_model_sizes_are_the_published_ones():
    shapes = facts("models")["shapes"]
    assert shapes["llama3_8b"]["parameters"] == 8_030_261_248
    assert shapes["llama3_70b"]["parameters"] == 70_553_706_496
    assert shapes["smollm2_135m"]["parameters"] == 134_515_008
    assert "8.03 B" in run("models")


def test_one_model_by_name_or_path(model):
    assert facts("models", "llama3_8b")["target_modules"][:2] == ["embed", "attn.q"]
    assert facts("models", model)["parameters"] == sum(t.size for t in load_file(model / "model.safetensors").values())
    assert "llama3_8b" in run("models", "lama3_8b", code=2)
