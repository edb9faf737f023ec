#!/usr/bin/env python3
"""What HF PEFT does to LoRA in a step beside the optimiser's rule: learning rates, a gradient, ranks.

    lora_steps.py --output DIR --base MODEL_DIR

DIR/rates.json              {case: {fields, rates: {<key>: of create_loraplus_optimizer at LR}}}, <key> as in an adapter's file
DIR/lora_fa.safetensors     a.<module>   gradient.<module>    A, and a gradient of B, whose scale is SCALE
                            projected.<module>                what create_lorafa_optimizer makes of that gradient
DIR/adalora.safetensors     <step>.importance.<key>           after update_and_allocate(step), steps from 1
                            <step>.ranks.<key>                of E: it is not zero
DIR/adalora.json            the fields of the run, and its steps
Before each step AdaLoRA's values are fill("<key>.value.<step>", ..., 1), its gradients fill("<key>.gradient.<step>", ..., 1).
PEFT's LoRA-FA runs in float32 here, not in bfloat16.
"""

import argparse
import json
import pathlib
import shutil

import peft
import torch
from make_fixtures import copies_of, fill
from peft.optimizers import create_loraplus_optimizer, lorafa
from safetensors.torch import save_file

LR, RATIO = 1e-2, 16.0
TARGETS = ["q_proj", "v_proj", "down_proj"]
RATES = {
    "lora": {"target_modules": ["q_proj", "v_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "bias": "all"},
    "lora_bias": {"target_modules": TARGETS, "lora_bias": True},
    "dora": {"target_modules": TARGETS, "use_dora": True, "bias": "lora_only"},
}
SCALE = 1.5  # lora_alpha / r
ADALORA = {"init_r": 6, "target_r": 2, "tinit": 0, "tfinal": 2, "deltaT": 2, "lora_alpha": 8, "target_modules": TARGETS}
STEPS = 6


def keys_of(model):
    """(key in a file, parameter) of what is trained, in the model's order"""
    keys = {tensor.data_ptr(): key for key, tensor in peft.get_peft_model_state_dict(model).items()}
    return [(keys[p.data_ptr()], p) for p in model.parameters() if p.requires_grad]


def write_rates(base, path):
    cases = {}
    for name, fields in RATES.items():
        model = peft.get_peft_model(base(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, **fields))
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO)
        rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        cases[name] = {"fields": {"r": 4} | fields, "rates": {key: rate_of[id(p)] for key, p in keys_of(model)}}
    path.write_text(json.dumps(cases, indent=1))


def write_lora_fa(base, path):
    lorafa.is_bf16_available = lambda: False
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4 * SCALE, target_modules=TARGETS)
    model = peft.get_peft_model(base(), config)
    optimizer = lorafa.create_lorafa_optimizer(model, r=4, lora_alpha=4 * SCALE, lr=LR)
    out = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            a.data.copy_(fill(name + ".a", a.shape, 0.25))
            b.grad = fill(name + ".gradient", b.shape, 1.0)
            path_of = name.removeprefix("base_model.model.")
            out |= {f"a.{path_of}": a.detach().clone(), f"gradient.{path_of}": b.grad.clone()}
    optimizer.step()
    for name, state in optimizer.state.items():
        if "exp_avg_B" in state:
            module = name.removeprefix("base_model.model.").removesuffix(".lora")
            out[f"projected.{module}"] = state["exp_avg_B"] / (1 - 0.9)
    save_file(out, path)


def write_adalora(base, path):
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=STEPS, **ADALORA)
    model = peft.get_peft_model(base(), config)
    parameters, out = keys_of(model), {}
    names = {p: name for name, p in model.base_model.model.named_parameters()}
    for step in range(1, STEPS + 1):
        for key, p in parameters:
            p.data.copy_(fill(f"{key}.value.{step}", p.shape, 1.0))
            p.grad = fill(f"{key}.gradient.{step}", p.shape, 1.0)
        model.base_model.update_and_allocate(step)
        importance = model.base_model.rankallocator.exp_avg_ipt
        for key, p in parameters:
            if importance:  # PEFT forgets it when the choice stands
                out[f"{step}.importance.{key}"] = importance[names[p]].clone()
            if key.endswith("lora_E"):
                out[f"{step}.ranks.{key}"] = (p.data != 0).flatten()
    save_file({key: value.contiguous() for key, value in out.items()}, path)
    path.with_suffix(".json").write_text(json.dumps({"fields": ADALORA, "steps": STEPS}))


def write(model_directory, output):
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    torch.set_num_threads(1)
    base = copies_of(model_directory)
    write_rates(base, output / "rates.json")
    write_lora_fa(base, output / "lora_fa.safetensors")
    write_adalora(base, output / "adalora.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--base", type=pathlib.Path, required=True, metavar="MODEL_DIR")
    arguments = parser.parse_args()
    write(arguments.base, arguments.output)


if __name__ == "__main__":
    main()
