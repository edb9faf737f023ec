"""The verbs that look, merge and export, run as a user does: graft methods, models, inspect, merge, export.

Numbers come from numpy (W + alpha / r * B A), from the reference libraries (transformers, gguf) and from published sizes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import gguf
import h5py
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

ROOT = Path(__file__).resolve().parents[2]
GRAFT = Path(os.environ.get("GRAFT_BINARY_DIR", ROOT / "build/release")) / "graft"
ORACLE = Path(os.environ.get("GRAFT_ORACLE_DIR", ROOT / "build/release/oracle"))
HEADS, KEY_HEADS, HEAD_DIM, WIDTH, INNER, VOCABULARY, LAYERS = 4, 2, 8, 24, 40, 32, 2
SHAPES = {"self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH), "self_attn.k_proj": (KEY_HEADS * HEAD_DIM, WIDTH),
          "self_attn.v_proj": (KEY_HEADS * HEAD_DIM, WIDTH), "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
          "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"]}


def run(*arguments, code=0):
    done = subprocess.run([GRAFT, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout if code == 0 else done.stderr


def facts(*arguments):
    return json.loads(run(*arguments, "--json"))


def base_tensors(rng, tied):
    tensors = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        tensors |= {f"model.layers.{i}.{name}.weight": shape for name, shape in SHAPES.items()}
        tensors |= {f"model.layers.{i}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
    if not tied:
        tensors["lm_head.weight"] = (VOCABULARY, WIDTH)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in tensors.items()}


def config(tied):
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "intermediate_size": INNER,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "head_dim": HEAD_DIM,
            "vocab_size": VOCABULARY, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": tied, "torch_dtype": "float32"}


def write_model(folder, tied=False):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(tied)))
    (folder / "tokenizer.json").write_text("{}")
    save_file(base_tensors(np.random.default_rng(1), tied), folder / "model.safetensors")
    return folder


def write_adapter(folder, changes=None, modules=None, zero_b=False):
    """A LoRA adapter of random numbers on `modules` (path -> (out, in)), default: those of LORA in every layer."""
    rng, settings = np.random.default_rng(2), LORA | (changes or {})
    modules = modules or {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in SHAPES.items()
                          if name.split(".")[1] in settings["target_modules"]}
    tensors = {}
    for path, (rows, columns) in modules.items():
        r = settings.get("rank_pattern", {}).get(path, settings["r"])
        tensors[f"base_model.model.{path}.lora_A.weight"] = rng.standard_normal((r, columns), np.float32)
        tensors[f"base_model.model.{path}.lora_B.weight"] = rng.standard_normal((rows, r), np.float32) * (0 if zero_b else 0.1)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def factors(adapter, path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    return (tensors[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model")


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "adapter")


def to_gguf_rows(rows, heads):
    """As llama.cpp's converter does it for Llama: LlamaModel.permute."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, tensors):
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    layer = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"model.layers.{i}.{hf}": f"blk.{i}.{ours}" for i in range(LAYERS) for hf, ours in layer.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS), writer.add_context_length(64), writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER), writer.add_head_count(HEADS), writer.add_head_count_kv(KEY_HEADS)
    writer.add_key_length(HEAD_DIM), writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_freq_base(10000.0)
    for name, value in tensors.items():
        heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(name.split(".")[-2])
        writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", to_gguf_rows(value, heads) if heads else value)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return path


# --- every verb -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["methods", "models", "inspect", "merge", "export", "completion", "env"])
def test_help_fits_forty_lines_and_ends_with_two_examples(verb):
    lines = run(verb, "--help").rstrip().splitlines()
    assert len(lines) <= 40
    assert lines[-3] == "Examples:" and all("graft " + verb in line for line in lines[-2:])


# --- methods, models --------------------------------------------------------------------------------------------------


def test_methods_lists_every_line_of_the_manifest():
    manifest = re.findall(r"^METHOD\((\w+), (\w+)", (ROOT / "peft/methods.def").read_text(), re.M)
    assert [(m["name"], m["group"]) for m in facts("methods")["methods"]] == manifest
    text = run("methods")
    assert all(f"  {name} " in text and f"{group}:\n" in text for name, group in manifest)


def test_a_method_shows_fields_families_and_forms():
    lora = facts("methods", "lora")
    assert lora["paper"] == "arXiv:2106.09685" and lora["peft_type"] == "LORA" and lora["mergeable"] is True
    assert "llama" in lora["families"] and lora["slots_by_default"] == ["attn.q", "attn.v"]
    assert lora["fields"]["r"] == {"type": "integer", "minimum": 1, "maximum": 4096, "description": "rank, the inner size", "default": 8}
    assert lora["exports_to"] == ["peft", "safetensors", "gguf", "merged model"]
    assert {"use_rslora", "init_from"} <= lora["fields"].keys() and "init_from" in run("methods", "lora")


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


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_adapter(adapter, tmp_path):
    found = facts("inspect", adapter)
    assert (found["kind"], found["r"], found["lora_alpha"], found["health"]) == ("adapter", 4, 6, "good")
    assert found["parameters"] == sum(t.size for t in load_file(adapter / "adapter_model.safetensors").values())
    untrained = facts("inspect", write_adapter(tmp_path / "zero", zero_b=True))
    assert untrained["zero_products"] == LAYERS * len(LORA["target_modules"])


def test_inspect_finds_what_is_wrong_with_an_adapter(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    gone, spoilt = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    del tensors[gone]
    tensors[spoilt][0, 0] = np.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    done = subprocess.run([GRAFT, "inspect", adapter, "--json"], capture_output=True, text=True)
    assert done.returncode == 3
    assert sorted(json.loads(done.stdout)["health"]) == sorted([f"missing: {gone}", f"not finite: {spoilt}"])


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
    assert facts("inspect", tmp_path / "run/adapter")["zero_products"] == 0
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


# --- merge ------------------------------------------------------------------------------------------------------------


def merged_by_numpy(model, adapter):
    tensors = load_file(model / "model.safetensors")
    for path in {k.removesuffix(".weight") for k in tensors if k.split(".")[-2] in LORA["target_modules"]}:
        a, b = factors(adapter, path)
        tensors[f"{path}.weight"] = tensors[f"{path}.weight"] + np.float32(LORA["lora_alpha"] / LORA["r"]) * (b @ a)
    return tensors


def assert_equal_tensors(folder, expected, tolerance=1e-5):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


def test_merge_is_w_plus_scaled_b_a(model, adapter, tmp_path):
    said = run("merge", "--model", model, "--adapter", adapter, "--output", tmp_path / "out")
    assert_equal_tensors(tmp_path / "out", merged_by_numpy(model, adapter))
    assert json.loads((tmp_path / "out/config.json").read_text()) == config(tied=False)
    assert (tmp_path / "out/tokenizer.json").exists()
    assert "survives rounding: 100.0000 % of the change, 6 tensors" in said


def test_merge_of_untouched_tensors_keeps_every_bit(model, adapter, tmp_path):
    run("merge", "--model", model, "--adapter", adapter, "--output", tmp_path / "out")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    untouched = [name for name in before if name.split(".")[-2] not in LORA["target_modules"]]
    assert untouched and all(before[name].tobytes() == after[name].tobytes() for name in untouched)


def test_merge_in_small_files_has_an_index(model, adapter, tmp_path):
    out = tmp_path / "out"
    run("merge", "--model", model, "--adapter", adapter, "--output", out, "--max-file-bytes", 20_000)
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) >= 2 and all(f.stat().st_size < 25_000 for f in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_file(model / "model.safetensors").values())
    assert_equal_tensors(out, merged_by_numpy(model, adapter))


def test_merge_into_gguf_undoes_llama_cpps_row_order(model, adapter, tmp_path):
    source = write_gguf(tmp_path / "m.gguf", load_file(model / "model.safetensors"))
    run("merge", "--model", source, "--adapter", adapter, "--output", tmp_path / "out")
    assert_equal_tensors(tmp_path / "out", merged_by_numpy(model, adapter))
    ids = torch.arange(10)[None]
    folder = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    run("merge", "--model", model, "--adapter", adapter, "--output", tmp_path / "same")
    same = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "same")
    assert torch.allclose(folder(ids).logits, same(ids).logits, atol=1e-4)


def test_merge_reports_what_bfloat16_loses(model, adapter, tmp_path):
    out = tmp_path / "out"
    said = run("merge", "--model", model, "--adapter", adapter, "--output", out, "--dtype", "bfloat16")
    before, exact = load_file(model / "model.safetensors"), merged_by_numpy(model, adapter)
    after = {name: t.float() for name, t in load_torch(out / "model.safetensors").items()}
    lost = change = 0.0
    for name, merged in exact.items():
        delta = merged - before[name]
        rounded = torch.from_numpy(before[name]).bfloat16().float().numpy()
        lost += ((after[name].numpy() - rounded - delta).astype(np.float64) ** 2).sum() if delta.any() else 0.0
        change += (delta.astype(np.float64) ** 2).sum()
    share = float(re.search(r"survives rounding: ([\d.]+) %", said)[1])
    assert share == pytest.approx(100 * (1 - lost / change), abs=1e-3) and share < 100
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("case", ["llama_tied", "llama_llama3_rope", "mistral_window", "qwen2", "qwen3"])
def test_transformers_computes_the_same_with_merged_weights_as_peft_with_the_adapter(case, tmp_path):
    run("merge", "--model", ORACLE / case / "model", "--adapter", ORACLE / case / "adapter", "--output", tmp_path / "out")
    oracle = load_torch(ORACLE / case / "oracle.safetensors")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        logits = merged(oracle["input_ids"]).logits
    assert (logits - oracle["adapter_logits"]).abs().max() < 1e-4
    assert (oracle["logits"] - oracle["adapter_logits"]).abs().max() > 1e-2


def test_merging_into_a_tied_head_unties_it(tmp_path):
    model = write_model(tmp_path / "model", tied=True)
    adapter = write_adapter(tmp_path / "adapter", {"target_modules": ["lm_head"]}, {"lm_head": (VOCABULARY, WIDTH)})
    run("merge", "--model", model, "--adapter", adapter, "--output", tmp_path / "out")
    expected = load_file(model / "model.safetensors")
    a, b = factors(adapter, "lm_head")
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"] + np.float32(1.5) * (b @ a)
    assert_equal_tensors(tmp_path / "out", expected)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_two_adapters_add_up(model, adapter, tmp_path):
    run("merge", "--model", model, "--adapter", adapter, adapter, "--output", tmp_path / "out")
    before, once = load_file(model / "model.safetensors"), merged_by_numpy(model, adapter)
    assert_equal_tensors(tmp_path / "out", {name: 2 * once[name] - before[name] for name in once})


def test_merge_overwrites_nothing(model, adapter, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert "nothing is overwritten" in run("merge", "--model", model, "--adapter", adapter, "--output", out, code=2)
    assert [f.name for f in out.iterdir()] == ["mine.txt"]


def test_a_merge_that_fails_leaves_nothing(model, tmp_path):
    other = write_adapter(tmp_path / "other", modules={"model.layers.7.self_attn.q_proj": (32, 24)})
    run("merge", "--model", model, "--adapter", other, "--output", tmp_path / "out", code=3)
    spoilt = write_adapter(tmp_path / "huge")
    tensors = load_file(spoilt / "adapter_model.safetensors")
    save_file({k: t * np.float32(1e30) for k, t in tensors.items()}, spoilt / "adapter_model.safetensors")
    assert "--dtype" in run("merge", "--model", model, "--adapter", spoilt, "--output", tmp_path / "out", code=7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["huge", "model", "other"]


# --- export -----------------------------------------------------------------------------------------------------------


def test_export_peft_drops_what_is_ours_and_copies_of_the_base(adapter, model, tmp_path):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"graft": {"method": "lora"}}))
    tensors = load_file(adapter / "adapter_model.safetensors")
    copy = {"base_model.model.lm_head.base_layer.weight": np.zeros((VOCABULARY, WIDTH), np.float32)}
    save_file(tensors | copy, adapter / "adapter_model.safetensors")
    run("export", "--adapter", adapter, "--to", "peft", "--output", tmp_path / "out", "--model", model)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text()) == settings
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    assert found.keys() == tensors.keys() and all((found[k] == tensors[k]).all() for k in tensors)


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


def test_export_says_what_it_needs(adapter, tmp_path):
    assert "--model" in run("export", "--adapter", adapter, "--to", "gguf", "--output", tmp_path / "o", code=2)
    run("export", "--adapter", adapter, "--to", "onnx", "--output", tmp_path / "o", code=2)
    assert "nothing is overwritten" in run("export", "--adapter", adapter, "--to", "peft", "--output", adapter, code=2)
    assert "adapter_config.json" in run("export", "--adapter", tmp_path, "--to", "peft", "--output", tmp_path / "o", code=3)
