"""LyCORIS's files, both ways: files that lycoris-lora wrote are read and computed with, and what Graft writes is loaded by
lycoris-lora again. The oracle is lycoris-lora's forward pass; its merge multiplies LoHa and LoKr by their scale twice."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest
import torch
from graft_cli import ORACLE, ROOT, graft, succeed, write_config
from safetensors.torch import load_file, save_file

os.environ["LYCORIS_KERNEL_BACKEND"] = "torch"
sys.path.insert(0, str(ROOT / "tests/oracle"))
import check_peft  # noqa: E402
from lycoris import modules as lycoris  # noqa: E402
from lycoris.modules.boft import ButterflyOFTModule  # noqa: E402
from lycoris.modules.ia3 import IA3Module  # noqa: E402
from make_fixtures import copies_of, fill  # noqa: E402

BASE = ORACLE / "qwen2"  # has biases on q, k, v
Q, V, UP, DOWN = "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"
LOCON, LOHA, LOKR = lycoris.LoConModule, lycoris.LohaModule, lycoris.LokrModule
OFT, GLORA, FULL = lycoris.DiagOFTModule, lycoris.GLoRAModule, lycoris.FullModule
NORM = lycoris.NormModule
TOLERANCE = 1e-4  # of the largest number: float32 in another order

# name -> the class of each module, and its arguments
CASES = {
    "locon": ({Q: LOCON, V: LOCON, DOWN: LOCON}, dict(lora_dim=4, alpha=2)),
    "locon_rs_scalar": ({Q: LOCON, DOWN: LOCON}, dict(lora_dim=4, alpha=2, rs_lora=True, use_scalar=True)),
    "dora": ({Q: LOCON, V: LOCON, DOWN: LOCON}, dict(lora_dim=4, alpha=2, weight_decompose=True)),
    "dora_of_columns": ({Q: LOCON, V: LOCON}, dict(lora_dim=4, weight_decompose=True, wd_on_out=False)),
    "loha": ({Q: LOHA, V: LOHA, DOWN: LOHA}, dict(lora_dim=4, alpha=2)),
    "loha_rs_scalar": ({Q: LOHA, V: LOHA}, dict(lora_dim=4, alpha=2, rs_lora=True, use_scalar=True)),
    "doha": ({Q: LOHA, V: LOHA}, dict(lora_dim=4, alpha=2, weight_decompose=True)),
    "lokr": ({Q: LOKR, V: LOKR, DOWN: LOKR}, dict(lora_dim=2, alpha=1)),
    "lokr_both": ({Q: LOKR, DOWN: LOKR}, dict(lora_dim=1, alpha=2, decompose_both=True)),
    "lokr_full": ({Q: LOKR, V: LOKR, DOWN: LOKR}, dict(lora_dim=2, alpha=1, full_matrix=True)),
    "lokr_factor": ({Q: LOKR, V: LOKR, DOWN: LOKR}, dict(lora_dim=2, factor=4)),
    "lokr_smaller_first": ({DOWN: LOKR}, dict(lora_dim=2, factor=16)),
    "lokr_unbalanced": ({UP: LOKR, DOWN: LOKR}, dict(lora_dim=2, unbalanced_factorization=True, use_scalar=True)),
    "dokr": ({Q: LOKR, V: LOKR}, dict(lora_dim=2, alpha=1, weight_decompose=True)),
    "ia3": ({Q: IA3Module, V: IA3Module}, {}),
    "ia3_of_inputs": ({DOWN: IA3Module, Q: IA3Module}, dict(train_on_input=True)),
    "full": ({Q: FULL, DOWN: FULL}, {}),
    "diag_oft": ({Q: OFT, V: OFT, DOWN: OFT}, dict(lora_dim=4)),
    "diag_oft_bounded": ({Q: OFT, DOWN: OFT}, dict(lora_dim=4, constraint=0.01, rescaled=True)),
    "boft": ({Q: ButterflyOFTModule, DOWN: ButterflyOFTModule}, dict(lora_dim=8)),
    "boft_rescaled": ({Q: ButterflyOFTModule, V: ButterflyOFTModule}, dict(lora_dim=8, rescaled=True)),
    "glora": ({Q: GLORA, V: GLORA, DOWN: GLORA}, dict(lora_dim=4, alpha=2)),
    "norms": ({"input_layernorm": NORM, "post_attention_layernorm": NORM}, {}),
    "mixed": ({Q: LOKR, V: LOHA, DOWN: LOCON}, dict(lora_dim=2, alpha=1)),
}
# Whether HF PEFT has the formula; else only Graft reads the folder.
PEFTS = {"locon", "locon_rs_scalar", "dora", "loha", "loha_rs_scalar", "lokr", "lokr_both", "lokr_full", "lokr_factor",
         "ia3_of_inputs", "norms"}
FOLDERS = {"diag_oft": 1, "boft_rescaled": 2, "lokr_full": 1, "lokr_unbalanced": 1, "mixed": 3}


@pytest.fixture(scope="module")
def base():
    """base() -> the model, a new one each time."""
    torch.set_num_threads(1)
    copy = copies_of(BASE / "model")

    def fresh():
        model = copy()
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):  # LyCORIS asks a norm that is not PyTorch's for its part without gain
                module._norm = types.MethodType(without_gain, module)
        return model

    return fresh


def without_gain(norm, x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def make_modules(model, kinds, arguments):
    """By their name in LyCORIS's files."""
    made = {}
    for i, layer in enumerate(model.model.layers):
        for path, kind in kinds.items():
            name = f"lycoris_model_layers_{i}_{path.replace('.', '_')}"
            made[name] = kind(name, layer.get_submodule(path), **arguments).eval()
            made[name].apply_to()
    return made


def tensors_of(modules):
    return {f"{name}.{key}": value.detach().clone().contiguous()
            for name, module in modules.items() for key, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    """written(name) -> (LyCORIS's file, the logits it means)."""
    done = {}

    def call(name):
        if name not in done:
            model = base()
            modules = make_modules(model, *CASES[name])
            with torch.no_grad():
                for prefix, module in modules.items():
                    for key, parameter in module.named_parameters():
                        parameter.add_(fill(f"{prefix}.{key}", parameter.shape, 0.3 if "oft" in name else 0.2))
            path = tmp_path_factory.mktemp(name) / "lycoris.safetensors"
            save_file(tensors_of(modules), path)
            done[name] = path, check_peft.logits_of(model, check_peft.read_rows(BASE / "rows.h5"))
        return done[name]
    return call


def folders_of(folder):
    return [folder] if (folder / "adapter_config.json").exists() else sorted(path for path in folder.iterdir())


def import_file(path, folder):
    succeed("export", "--adapter", path, "--to", "peft", "--model", BASE / "model", "--output", folder)
    return folders_of(folder)


def logits_of_graft(folders, directory):
    config = write_config(directory / "run.yaml", BASE / "rows.h5", f'model.name_or_path="{BASE / "model"}"',
                          'model.quantization="none"', "data.packing=false",
                          f"model.adapters={json.dumps([str(folder) for folder in folders])}")
    succeed("eval", config, "--logits", directory / "logits.safetensors")
    saved = load_file(directory / "logits.safetensors")
    return [saved[f"row.{i}"] for i in range(len(saved))]


def expect_logits(ours, theirs, base):
    untouched = check_peft.logits_of(base(), check_peft.read_rows(BASE / "rows.h5"))
    size = max(logits.abs().max().item() for logits in theirs)
    assert check_peft.largest_difference(ours, theirs) < TOLERANCE * size
    assert check_peft.largest_difference(untouched, theirs) > 100 * TOLERANCE * size, "the adapter changes nothing"


@pytest.mark.parametrize("name", CASES)
def test_files_of_lycoris_compute_the_same_here(name, written, base, tmp_path):
    path, theirs = written(name)
    folders = import_file(path, tmp_path / "adapter")
    types = [json.loads((folder / "adapter_config.json").read_text())["peft_type"] for folder in folders]
    assert all((kind is not None) == (name in PEFTS) for kind in types) or name == "mixed", types
    if name in FOLDERS:
        assert len(folders) == FOLDERS[name]
    expect_logits(logits_of_graft(folders, tmp_path), theirs, base)


@pytest.mark.parametrize("name", CASES)
def test_lycoris_loads_what_is_written_back(name, written, base, tmp_path):
    path, theirs = written(name)
    import_file(path, tmp_path / "adapter")
    back = tmp_path / "back.safetensors"
    succeed("export", "--adapter", tmp_path / "adapter", "--to", "lycoris", "--model", BASE / "model", "--output", back)
    model, tensors = base(), load_file(back)
    for name in sorted({key.split(".")[0] for key in tensors}):
        layer = model.get_submodule(module_path(name))
        kind, weights = lycoris.get_module(tensors, name)
        module = load(kind, name, layer, weights, tensors).eval()
        module.apply_to()
    expect_logits(check_peft.logits_of(model, check_peft.read_rows(BASE / "rows.h5")), theirs, base)


def module_path(name):
    layer, _, rest = name.removeprefix("lycoris_model_layers_").partition("_")
    if rest.endswith("layernorm"):
        return f"model.layers.{layer}.{rest}"
    block, _, leaf = rest.partition("_attn_") if "_attn_" in rest else rest.partition("_")
    return f"model.layers.{layer}." + (f"self_attn.{leaf}" if "_attn_" in rest else f"{block}.{leaf}")


def load(kind, name, layer, weights, tensors):
    """As create_lycoris_from_weights does it, but for what lycoris-lora 4.1.3 cannot load at all."""
    state = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    if kind is IA3Module:  # make_module passes it one argument too many
        module = kind(name, layer, train_on_input=bool(state["on_input"]))
        module.load_state_dict(state)
        return module
    first = state.get("lokr_w1", torch.ones(1, 1)).shape[0]
    if first > getattr(layer, "out_features", first * first) // first:  # it forgets that they are unbalanced
        module = kind(name, layer, lora_dim=2, alpha=float(state["alpha"]), unbalanced_factorization=True)
        module.load_state_dict(state)
        return module
    if "dora_scale" in state and state["dora_scale"].shape[0] == 1:  # and of which side the magnitudes are
        module = kind(name, layer, lora_dim=4, alpha=float(state["alpha"]), weight_decompose=True, wd_on_out=False)
        module.load_state_dict(state)
        return module
    return lycoris.make_module(kind, weights, name, layer)


@pytest.mark.parametrize("name", ["lora_rslora", "lora_patterns", "lora_dora", "loha_patterns", "lokr_patterns",
                                  "lokr_both", "lokr_full"])
def test_pefts_adapters_are_written_for_lycoris(name, base, tmp_path):
    adapter, back = ORACLE / "peft_methods" / name, tmp_path / "lycoris.safetensors"
    succeed("export", "--adapter", adapter, "--to", "lycoris", "--model", BASE / "model", "--output", back)
    model, tensors = base(), load_file(back)
    for key in sorted({key.split(".")[0] for key in tensors}):
        layer = model.get_submodule(module_path(key))
        kind, weights = lycoris.get_module(tensors, key)
        load(kind, key, layer, weights, tensors).eval().apply_to()
    input_ids = load_file(BASE / "oracle.safetensors")["input_ids"]
    with torch.no_grad():
        ours = model(input_ids=input_ids).logits
    theirs = load_file(adapter / "oracle.safetensors")["logits"]
    assert (ours - theirs).abs().max() < TOLERANCE * theirs.abs().max()


@pytest.mark.parametrize("fields", [{}, {"scale_by": "pieces", "block_size": 2, "inference_r": 4},
                                    {"scale_by": "rank", "inference_r": 2}])
def test_dyloras_ranks_in_use_are_written_as_a_locon(fields, base, tmp_path):
    entry = {"method": "dylora", "r": 6, "lora_alpha": 48, "target_modules": ["attn.q", "mlp.down"], **fields}
    folder = tmp_path / "training"
    folder.mkdir()
    config = write_config(folder / "run.yaml", BASE / "rows.h5", f'model.name_or_path="{BASE / "model"}"',
                          'model.quantization="none"', "data.packing=false", f"peft=[{json.dumps(entry)}]",
                          "train.max_steps=6", "train.gradient_accumulation_steps=1", "train.learning_rate=0.05")
    succeed("train", config)
    adapter, back = folder / "run/adapter", tmp_path / "back.safetensors"
    succeed("export", "--adapter", adapter, "--to", "lycoris", "--model", BASE / "model", "--output", back)
    model, tensors = base(), load_file(back)
    for key in sorted({key.split(".")[0] for key in tensors}):
        kind, weights = lycoris.get_module(tensors, key)
        assert kind is LOCON and weights[1].shape[0] == fields.get("inference_r", 6)
        load(kind, key, model.get_submodule(module_path(key)), weights, tensors).eval().apply_to()
    theirs = check_peft.logits_of(model, check_peft.read_rows(BASE / "rows.h5"))
    expect_logits(logits_of_graft([adapter], tmp_path), theirs, base)


def test_what_does_not_fit_is_refused_by_name(base, tmp_path):
    def refused(tensors, words, code=3):
        path = tmp_path / "bad.safetensors"
        save_file(tensors, path)
        done = graft("export", "--adapter", path, "--to", "peft", "--model", BASE / "model", "--output", tmp_path / "out")
        assert done.returncode == code and words in done.stderr, done.stderr
        assert not (tmp_path / "out").exists()

    q = "lycoris_model_layers_0_self_attn_q_proj."
    refused({f"{q}lora_up.weight": torch.ones(48, 4)}, "lora_down.weight is missing")
    refused({f"{q}lora_up.weight": torch.ones(48, 4), f"{q}lora_down.weight": torch.ones(4, 40)}, "expected [4, 48]")
    refused({"lycoris_model_layers_9_self_attn_q_proj.diff": torch.ones(48, 48)}, "unknown: lycoris_model_layers_9")
    refused({f"{q}strange": torch.ones(4)}, "strange")
    refused({f"{q}diff": torch.full((48, 48), torch.nan)}, "not finite")
    refused({f"{q}diff": torch.ones(48, 48), f"{q}extra": torch.ones(1)}, "unknown: model.layers.0.self_attn.q_proj.extra")
    adapter = ORACLE / "peft_methods/oft"
    done = graft("export", "--adapter", adapter, "--to", "lycoris", "--model", BASE / "model", "--output", tmp_path / "o")
    assert done.returncode == 2 and "rotate: outputs" in done.stderr
    save_file({f"{q}diff": torch.ones(48, 48)}, tmp_path / "file.safetensors")
    done = graft("export", "--adapter", tmp_path / "file.safetensors", "--to", "gguf", "--model", BASE / "model", "--output", tmp_path / "o")
    assert done.returncode == 2 and "--to peft" in done.stderr


@pytest.mark.parametrize("dtype, name", [(torch.complex64, "C64"), (torch.uint64, "U64"), (torch.uint16, "U16"), (torch.bool, "BOOL"),
                                         (torch.float8_e4m3fn, "F8_E4M3")])
def test_weights_that_are_no_floats_are_refused_by_name(written, tmp_path, dtype, name):
    tensors = load_file(written("locon")[0])
    weight = next(key for key in tensors if key.endswith("lora_up.weight"))
    save_file(tensors | {weight: tensors[weight].to(dtype)}, tmp_path / "l.safetensors")
    done = graft("export", "--adapter", tmp_path / "l.safetensors", "--to", "peft", "--model", BASE / "model", "--output", tmp_path / "out")
    assert done.returncode == 3 and f"no float: {weight} is {name}" in done.stderr
    assert not (tmp_path / "out").exists()
