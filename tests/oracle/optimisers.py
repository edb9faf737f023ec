"""Six steps of each optimiser as bitsandbytes and torch take them, on a tensor that AdamW8bit quantises and one that it
leaves in float32.

FILE: safetensors.  start.<tensor>   gradient.<step>.<tensor>
                    <optim>.<tensor>.value   <optim>.<tensor>.<name of the state>     after the last step
"""

import bitsandbytes
import torch
from bitsandbytes.backends.cpu import ops
from safetensors.torch import save_file

SETTINGS = dict(lr=1e-2, weight_decay=0.1)
BETAS = dict(betas=(0.9, 0.99))
STEPS = 6
SHAPES = {"large": (70, 100), "small": (40,)}  # the last block of the large one is not full
MAKE = {"adamw": lambda p: torch.optim.AdamW(p, **SETTINGS, **BETAS),
        "adamw_8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, **SETTINGS, **BETAS),
        "sgd": lambda p: torch.optim.SGD(p, **SETTINGS),
        "lion": lambda p: bitsandbytes.optim.Lion(p, **SETTINGS, **BETAS)}
NAMES = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "state1": "exp_avg", "state2": "exp_avg_sq",
         "absmax1": "exp_avg_absmax", "absmax2": "exp_avg_sq_absmax"}


def exact_quantize(values, code, absmax, out, blocksize):
    """As on a GPU. On a CPU bitsandbytes rounds float32 to 65,536 steps of [-1, 1] first, float64 it does not."""
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise(values.double(), code, blocksize)
    out.copy_(codes), absmax.copy_(scales)


def write(path):
    ops._quant_blockwise_fp32_direct = exact_quantize
    torch.manual_seed(3)
    start = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    gradients = [{name: torch.randn(shape) * 10 ** torch.randn(shape) for name, shape in SHAPES.items()}
                 for _ in range(STEPS)]
    tensors = {f"start.{name}": value for name, value in start.items()}
    tensors |= {f"gradient.{step}.{name}": g for step, of in enumerate(gradients) for name, g in of.items()}
    for optim, make in MAKE.items():
        parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
        optimizer = make(parameters.values())
        for of in gradients:
            for name, parameter in parameters.items():
                parameter.grad = of[name].clone()
            optimizer.step()
        for name, parameter in parameters.items():
            tensors[f"{optim}.{name}.value"] = parameter.detach()
            for key, value in optimizer.state[parameter].items():
                if key in NAMES:
                    tensors[f"{optim}.{name}.{NAMES[key]}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
