"""Writes tests/golden/bnb_files.json: small safetensors files with one bitsandbytes matrix each, as transformers saves
them, and the matrices that bitsandbytes rebuilds from them. usage: python tests/oracle/bnb_files.py"""

import json
import pathlib

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save


def case(name, shape, dtype, quant_type, nested, storage):
    torch.manual_seed(len(name))
    dense = torch.randn(shape).to(dtype)
    codes, state = bnb.quantize_4bit(
        dense, quant_type=quant_type, compress_statistics=nested, quant_storage=storage, blocksize=64
    )
    parts = {"up.weight": codes}
    parts |= {f"up.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    rebuilt = bnb.dequantize_4bit(codes, state)
    return {
        "name": name,
        "file": save(parts, {"format": "pt"}).hex(),
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "quant_type": quant_type,
        "nested": nested,
        "dense": rebuilt.contiguous().view(torch.uint8).numpy().tobytes().hex(),
    }


# Rows of 64: on others the CPU dequantize of bitsandbytes 0.50.2 reads wrong scales.
golden = {
    "checked_with": "bitsandbytes 0.50.2, safetensors 0.8.0",
    "cases": [
        case("nested nf4", (6, 64), torch.bfloat16, "nf4", True, torch.uint8),
        case("plain nf4 stored as bfloat16", (4, 64), torch.float32, "nf4", False, torch.bfloat16),
        case("plain fp4 stored as float32", (4, 64), torch.float16, "fp4", False, torch.float32),
    ],
}
target = pathlib.Path(__file__).parent.parent / "golden" / "bnb_files.json"
target.write_text(json.dumps(golden, indent=1) + "\n")
