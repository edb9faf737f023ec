#!/usr/bin/env python3
"""LoRA's first values as HF PEFT computes them, of the base's matrices and of data.

    lora_starts.py --output DIR --base MODEL_DIR

DIR/<name>.safetensors, of the two rows and labels of make_fixtures.py on MODEL_DIR (qwen2):
start.<key>   float32   A and B at step 0, <key> as in an adapter's file; EVA: of the slots that got a rank
base.<key>    float32   the matrix under them, where PEFT changed it
logits        float32 [2, 24, V]   of the adapted model at step 0
grad.<key>    float32   of the mean loss over all targets of both rows, at step 0
DIR/<name>.json: the fields of the run, by PEFT's names. Where PEFT draws, or cannot run without a GPU, it is changed:
lora_ga   torch.svd_lowrank gives the exact triplets
eva       exact instead of low-rank decompositions in PEFT's IncrementalPCA; one batch, which PEFT sees twice; whitened
          once, where PEFT divides in place, and so twice what slots of one input share
loftq     runs on the CPU, in rows of 64, since bitsandbytes dequantises others wrongly there; alpha = r, the only case it
          is right for; the blocks' other matrices are in NF4 too
"""

import argparse
import inspect
import json
import pathlib
import shutil
import warnings

import bitsandbytes
import peft
import torch
from make_fixtures import copies_of

from peft.tuners.lora import corda, eva, layer, loraga
from peft.utils import incremental_pca, loftq_utils
from rule import loss_of, rows_and_labels
from safetensors.torch import save_file

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
COMMON = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS}
CASES = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_rslora": {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"v_proj": 3}},
    "pissa_dora": {"init_lora_weights": "pissa", "use_dora": True},
    "olora": {"init_lora_weights": "olora"},
    "mica": {"init_lora_weights": "mica"},
    "loftq": {"init_lora_weights": "loftq", "lora_alpha": 4, "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    "loftq_five": {"init_lora_weights": "loftq", "lora_alpha": 4, "loftq_config": {"loftq_bits": 4, "loftq_iter": 5}},
    "corda": {"init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}},
    "corda_kpm": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "ArB2r", "scale": "stable"}},
    "lora_ga_alternating": {"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "ArBr", "scale": "gd_scale"}},
    "lora_ga_weight_svd": {"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "A2rBr", "scale": "weight_svd"}},
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "use_label_mask": False}},
    "eva_whiten": {"init_lora_weights": "eva",
                   "eva_config": {"rho": 1.5, "use_label_mask": False, "whiten": True, "adjust_scaling_factors": False}},
    "eva_targets": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    # 4.5 directions of q_proj and down_proj, to even; v_proj, whose input is q_proj's, looks for as many and not for 2
    "eva_candidates": {"init_lora_weights": "eva", "r": 3, "rank_pattern": {"o_proj": 8, "v_proj": 1}, "eva_config": {"rho": 1.5}},
}
SECTIONS = {"eva_config": peft.EvaConfig, "corda_config": peft.tuners.lora.config.CordaConfig,
            "lora_ga_config": peft.LoraGAConfig, "loftq_config": peft.LoftQConfig}


def exact_triplets(w, q=6, niter=2, M=None):
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    return u[:, :q], s[:q], vt[:q].T


def prepare_peft():
    torch.svd_lowrank = exact_triplets
    pca = incremental_pca.IncrementalPCA
    eva.IncrementalPCA = lambda **options: pca(**options | {"lowrank": False})
    source = inspect.getsource(eva._get_eva_state_dict).replace("u /= hook", "u = u / hook")
    exec(source, vars(eva))
    source = inspect.getsource(loftq_utils.loftq_init).replace('else "cuda"', 'else "cpu"')
    source = source.replace('res.to("cpu"), requires', "res.reshape(-1, 64), requires")
    source = source.replace("res = weight - dequantized_weight", "dequantized_weight = dequantized_weight.view_as(weight)\n"
                            "        res = weight - dequantized_weight")
    exec(source, vars(loftq_utils))
    layer.loftq_init = loftq_utils.loftq_init


def through_nf4(w):
    packed, state = bitsandbytes.functional.quantize_4bit(w.reshape(-1, 64), quant_type="nf4", compress_statistics=False)
    return bitsandbytes.functional.dequantize_4bit(packed, state).view_as(w)


def wrap(model, fields):
    sections = {name: SECTIONS[name](**fields[name]) for name in SECTIONS if name in fields}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **COMMON | fields | sections)
    input_ids, labels = rows_and_labels()
    if config.init_lora_weights == "loftq":
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head" and name.split(".")[-1] not in TARGETS:
                module.weight.data = through_nf4(module.weight.data)
    if config.init_lora_weights == "corda":
        corda.preprocess_corda(model, config, run_model=lambda: [model(input_ids=row[None]) for row in input_ids])
    if config.init_lora_weights == "lora_ga":
        loraga.preprocess_loraga(model, config, lambda: loss_of(model(input_ids=input_ids).logits, labels).backward())
    adapted = peft.get_peft_model(model, config)
    if config.init_lora_weights == "eva":
        batch = {"input_ids": input_ids, "labels": labels}
        peft.initialize_lora_eva_weights(adapted, [batch], show_progress_bar=False)
    return adapted.eval()


def write_case(base, fields, path):
    model = wrap(base(), fields)
    input_ids, labels = rows_and_labels()
    logits = model(input_ids=input_ids).logits
    loss_of(logits, labels).backward()
    state, untouched = peft.get_peft_model_state_dict(model), base().state_dict()
    names = {tensor.data_ptr(): key for key, tensor in state.items()}
    out = {"logits": logits.detach().contiguous()} | {f"start.{key}": value.detach() for key, value in state.items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.data_ptr() in names:
            out["grad." + names[parameter.data_ptr()]] = parameter.grad
        key = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if ".base_layer.weight" in name and not torch.equal(parameter, untouched[key]):
            out["base." + key] = parameter.detach()
    save_file({key: value.clone().contiguous() for key, value in out.items()}, f"{path}.safetensors")
    config = model.peft_config["default"]
    written = COMMON | fields | {"decided_ranks": config.rank_pattern, "decided_alphas": config.alpha_pattern}
    path.with_suffix(".json").write_text(json.dumps(written))


def write(model_directory, output):
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    torch.set_num_threads(1)
    base = copies_of(model_directory)
    prepare_peft()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, fields in CASES.items():
            write_case(base, fields, output / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--base", type=pathlib.Path, required=True, metavar="MODEL_DIR")
    arguments = parser.parse_args()
    write(arguments.base, arguments.output)


if __name__ == "__main__":
    main()
