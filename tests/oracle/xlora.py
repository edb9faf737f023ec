"""X-LoRA of HF PEFT over two LoRAs, with a router away from its start.

DIR/lora_0, DIR/lora_1     the LoRAs as PEFT wrote them: of other modules, ranks and scales; q_proj is in both
DIR/<case>/adapter_config.json, adapter_model.safetensors     the case's X-LoRA; PEFT loads it, and computes the same
DIR/<case>/oracle.safetensors   logits float32 [2, 24, V], loss float32 [1]: mean over the targets
                                grad.<key>  float32  of the loss, <key> as in adapter_model.safetensors
DIR/lost                        a case as PEFT 0.21.2 saves it: without the layers whose numbers are names of its adapters

Base, rows and labels as in peft_methods.py. PEFT's own save drops `layers.0`, so the file is written from the model.
"""

import json
import shutil
import warnings

import peft
import torch
from make_fixtures import copies_of, fill, rows_and_labels
from safetensors.torch import load_file, save_file

LORAS = [dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
         dict(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "up_proj"])]
MLP = dict(xlora_depth=2, xlora_size=16)
CASES = {
    "plain": {},
    "mlp": MLP | dict(softmax_temperature=0.7),
    "mlp_of_three": dict(xlora_depth=3, xlora_size=16, xlora_dropout_p=0.0),
    "layerwise": dict(layerwise_scalings=True, global_scaling_weight=1.5),
    "layerwise_mlp": MLP | dict(layerwise_scalings=True, enable_softmax=False),
    "top_k": dict(layerwise_scalings=True, top_k_lora=1),
    "top_k_mlp": MLP | dict(top_k_lora=1, enable_softmax=False),
    "softmax_of_top_k": dict(layerwise_scalings=True, top_k_lora=2, enable_softmax=False, enable_softmax_topk=True),
}
ROUTER = "internal_xlora_classifier"


def write_loras(base, output):
    for number, fields in enumerate(LORAS):
        model = peft.get_peft_model(base(), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(fill(f"{number} {name}", parameter.shape, 0.3))
        model.save_pretrained(output / f"lora_{number}")


def write_case(base, fields, directory):
    adapters = {str(number): str(directory.parent / f"lora_{number}") for number in range(len(LORAS))}
    plain = base()
    plain.config.use_cache = False
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=plain.config.hidden_size, adapters=adapters, **fields)
    model = peft.get_peft_model(plain, config).eval()
    router = {name: p for name, p in model.named_parameters() if ROUTER in name}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == router.keys()
    with torch.no_grad():
        for name, parameter in router.items():
            parameter.copy_(fill(name, parameter.shape, 0.5))
    input_ids, labels = rows_and_labels()
    logits = model(input_ids=input_ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()

    model.save_pretrained(directory)
    for number in adapters:
        shutil.rmtree(directory / number)
    (directory / "README.md").unlink(missing_ok=True)
    saved = load_file(directory / "adapter_model.safetensors").keys()
    assert f"base_model.{ROUTER}.layers.0.weight" not in saved, "PEFT saves the whole router now: read its own files"
    lost = directory.parent / "lost"
    if not lost.exists() and saved:
        shutil.copytree(directory, lost)
    save_file({name: p.detach() for name, p in router.items()}, directory / "adapter_model.safetensors")
    save_file({"logits": logits.detach().contiguous(), "loss": loss.detach().reshape(1),
               **{f"grad.{name}": p.grad for name, p in router.items()}}, directory / "oracle.safetensors")

    plain = base()
    untouched = plain(input_ids=input_ids).logits
    plain.config.use_cache = False
    loaded = peft.PeftModel.from_pretrained(plain, directory).eval()(input_ids=input_ids).logits
    assert torch.equal(loaded, logits), f"{directory.name}: loaded, PEFT computes other logits"
    assert (logits - untouched).abs().max() > 0.05, f"{directory.name}: changes nothing"
    config = json.loads((directory / "adapter_config.json").read_text())
    config["adapters"] = {number: f"lora_{number}" for number in adapters}  # no paths of this machine
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))


def write(model_directory, output):
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    base = copies_of(model_directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_loras(base, output)
        for name, fields in CASES.items():
            write_case(base, fields, output / name)
