"""Writes tests/golden/gguf_blocks.json with PyPI gguf: random blocks of each type and their dequantised bits, and one
whole small file, for models/io. usage: python tests/oracle/gguf_blocks.py"""

import json
import pathlib
import tempfile

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

TYPES = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
# Where each type keeps its float16 numbers: these must be finite, or the bits of a NaN would be compared.
HALVES = {"F16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2],
          "Q5_K": [0, 2], "Q6_K": [208]}


def blocks_of(name, rng):
    elems, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    count = 64 if elems == 1 else 8 if elems == 32 else 3
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in HALVES.get(name, []):
        blocks[:, at + 1] &= 0xBF  # exponent below 16: finite
        blocks[0, at + 1] &= 0x83  # one subnormal
    if name == "BF16":
        blocks[:, 1] &= 0xBF
    values = gguf.quants.dequantize(blocks.reshape(-1), GGMLQuantizationType[name])
    return {"blocks": blocks.tobytes().hex(), "values": values.astype("<f4").tobytes().hex()}


def small_file():
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "small.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint8("k.u8", 200)
        writer.add_int8("k.i8", -100)
        writer.add_uint16("k.u16", 60000)
        writer.add_int16("k.i16", -30000)
        writer.add_uint32("k.u32", 4000000000)
        writer.add_int32("k.i32", -2000000000)
        writer.add_float32("k.f32", 0.1)
        writer.add_bool("k.bool", True)
        writer.add_string("k.string", "h\u00e9llo")
        writer.add_array("k.strings", ["a", "", "b c"])
        writer.add_array("k.ints", [1, -2, 3])
        writer.add_array("k.floats", [0.5, -0.25])
        writer.add_uint64("k.u64", 2**63)
        writer.add_int64("k.i64", -(2**62))
        writer.add_float64("k.f64", 0.1)
        writer.add_tensor("a.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
        writer.add_tensor("b.weight", np.arange(8, dtype=np.float16).reshape(4, 2))
        writer.add_tensor("c.weight", np.arange(3, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes().hex()


rng = np.random.default_rng(20)
golden = {"checked_with": "gguf 0.19.0", "types": {name: blocks_of(name, rng) for name in TYPES}, "file": small_file()}
target = pathlib.Path(__file__).parent.parent / "golden" / "gguf_blocks.json"
target.write_text(json.dumps(golden, indent=1) + "\n")
