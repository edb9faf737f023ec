"""graft merge. Numbers come from numpy (W + alpha / r * B A) and from transformers."""

from __future__ import annotations

import json
import re
import sys

import bitsandbytes
import numpy as np
import pytest
import torch
import transformers
from graft_cli import ORACLE, ROOT, succeed, write_config
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from tiny_base import LORA, VOCABULARY, WIDTH, config, facts, factors, run, write_adapter, write_gguf, write_model

sys.path.insert(0, str(ROOT / "tests/oracle"))
import check_peft  # noqa: E402
import peft_methods  # noqa: E402


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


def test_a_model_merged_from_gguf_has_its_tokenizer(model, adapter, tmp_path):
    source, out = write_gguf(tmp_path / "m.gguf", load_file(model / "model.safetensors"), tokenizer=True), tmp_path / "out"
    assert "tokenizer" not in run("merge", "--model", source, "--adapter", adapter, "--output", out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("cab ab</s>").input_ids == [28, 2, 27, 26, 27, 29] and tokenizer.decode([2, 27, 26, 0]) == "cab a"
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == [29, 30]
    generate = ["generate", "--quantization", "none", "--max-new-tokens", 12, "--prompt", "cab"]
    said = run(*generate, "--model", out)
    assert len(said) > 3 and said == run(*generate, "--model", source, "--adapter", adapter)


def test_a_merge_without_a_tokenizer_says_so(model, adapter, tmp_path):
    source = write_gguf(tmp_path / "m.gguf", load_file(model / "model.safetensors"))
    assert f"{source} has none" in run("merge", "--model", source, "--adapter", adapter, "--output", tmp_path / "out")
    (model / "tokenizer.json").unlink()
    said = run("merge", "--model", model, "--adapter", adapter, "--output", tmp_path / "again")
    assert f"add one before generating: {model} has none to copy" in said


class Sums:
    """What a merge should say of the changes `delta` and of what of them is found in the output."""

    def __init__(self):
        self.change = self.kept = self.noise = 0.0

    def add(self, kept, delta):
        if abs(delta).max() > 1e-6:
            self.change += float((delta ** 2).sum())
            self.kept += float((kept * delta).sum())
            self.noise += float(((kept - delta) ** 2).sum())

    def check(self, said):
        share, noise = map(float, re.search(r"survives rounding: ([\d.]+) % .* noise of ([\d.e+-]+) times", said).groups())
        assert share == pytest.approx(100 * self.kept / self.change, abs=0.1)
        assert noise == pytest.approx((self.noise / self.change) ** 0.5, rel=1e-2) and noise > 0


def test_merge_reports_what_bfloat16_loses(model, adapter, tmp_path):
    out = tmp_path / "out"
    said = run("merge", "--model", model, "--adapter", adapter, "--output", out, "--dtype", "bfloat16")
    before, exact = load_file(model / "model.safetensors"), merged_by_numpy(model, adapter)
    after = {name: t.float() for name, t in load_torch(out / "model.safetensors").items()}
    sums = Sums()
    for name, merged in exact.items():
        delta = (merged - before[name]).astype(np.float64)
        rounded = torch.from_numpy(before[name]).bfloat16().float().numpy()
        sums.add(after[name].numpy().astype(np.float64) - rounded, delta)
    sums.check(said)
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


def codes_by_bitsandbytes(dense, kind, nested):
    codes, state = bitsandbytes.functional.quantize_4bit(dense, blocksize=64, quant_type=kind, compress_statistics=nested)
    parts = {"": codes} | {f".{key}": value for key, value in state.as_dict(packed=True).items()}
    return parts, bitsandbytes.functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("kind, nested", [("nf4", True), ("fp4", False)])
def test_a_merge_into_four_bits_is_bitsandbytes_own_and_loads_in_transformers(kind, nested, tmp_path):
    case, out = ORACLE / "llama_nf4", tmp_path / "out"  # widths in whole blocks of 64
    base = ["merge", "--model", case / "model", "--adapter", case / "adapter"]
    run(*base, "--output", tmp_path / "dense", "--dtype", "float32")
    said = run(*base, "--output", out, "--quantization", kind, "--dtype", "float32", *([] if nested else ["--no-double-quantization"]))
    dense, found = load_torch(tmp_path / "dense/model.safetensors"), load_torch(out / "model.safetensors")
    before = transformers.AutoModelForCausalLM.from_pretrained(case / "model").dequantize().state_dict()
    sums = Sums()
    rebuilt = {}
    for name, value in dense.items():
        if "_proj" not in name:
            assert torch.equal(found.pop(name), value)
            continue
        parts, rebuilt[name] = codes_by_bitsandbytes(value, kind, nested)
        for suffix, expected in parts.items():
            part = found.pop(name + suffix)
            if "quant_state" in suffix:
                assert json.loads(bytes(part)) == json.loads(bytes(expected))
            else:
                assert torch.equal(part.view(torch.uint8), expected.contiguous().view(torch.uint8)), name + suffix
        delta = (value - before[name].float()).double()
        kept = (rebuilt[name] - codes_by_bitsandbytes(before[name].float(), kind, nested)[1]).double()
        sums.add(kept, delta)
    assert not found
    sums.check(said)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.quantization_config.bnb_4bit_quant_type == kind
    loaded = model.dequantize().state_dict()
    assert rebuilt and all(torch.equal(loaded[name].float(), value) for name, value in rebuilt.items())
    assert facts("inspect", out)["health"] == "tensors and config agree"


def test_a_merge_takes_what_an_adapter_has_from_the_base(tmp_path):
    """PSOFT turns singular directions of the base, which its file does not hold."""
    case, adapter = ORACLE / "qwen2", ORACLE / "peft_methods/psoft"
    run("merge", "--model", case / "model", "--adapter", adapter, "--output", tmp_path / "out")
    oracle = load_torch(adapter / "oracle.safetensors")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        logits = merged(input_ids=peft_methods.rows_and_labels()[0]).logits
    assert (logits - oracle["logits"]).abs().max() < 1e-4 * oracle["logits"].abs().max()


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


@pytest.mark.parametrize("method", ["bitfit", "beft"])
def test_biases_merge_into_those_that_the_base_has(tmp_path, method):
    """transformers computes from the folder what the adapter does; its matrices are the base's, bit for bit."""
    base, rows = ORACLE / "qwen2/model", ORACLE / "qwen2/rows.h5"
    path = write_config(tmp_path / "run.yaml", rows, f'model.name_or_path="{base}"', 'model.quantization="none"',
                        f'peft=[{{"method": "{method}", "target_modules": ["attn.q", "attn.v"]}}]')
    succeed("train", path)
    succeed("eval", path, "--logits", tmp_path / "logits.safetensors")
    run("merge", "--model", base, "--adapter", tmp_path / "run/adapter", "--output", tmp_path / "out")
    expected = load_torch(tmp_path / "logits.safetensors")
    merged, before = check_peft.load_base(tmp_path / "out"), check_peft.load_base(base)
    documents = check_peft.read_rows(rows)
    for i, logits in enumerate(check_peft.logits_of(merged, documents)):
        torch.testing.assert_close(logits, expected[f"row.{i}"], atol=1e-4, rtol=0)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed == {f"model.layers.{i}.self_attn.{m}_proj.bias" for i in (0, 1) for m in "qv"}


def test_a_bias_that_the_base_has_not_is_no_part_of_a_merged_model(tmp_path):
    base, rows = ORACLE / "qwen2/model", ORACLE / "qwen2/rows.h5"
    path = write_config(tmp_path / "run.yaml", rows, f'model.name_or_path="{base}"',
                        'peft=[{"method": "bitfit", "target_modules": ["attn.q", "attn.o"]}]', "train.max_steps=1")
    succeed("train", path)
    said = run("merge", "--model", base, "--adapter", tmp_path / "run/adapter", "--output", tmp_path / "out", code=2)
    assert "block.0.attn.o" in said
