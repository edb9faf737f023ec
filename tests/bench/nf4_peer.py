"""The rows of nf4_bench for bitsandbytes' CPU kernels, one JSON line each. Usage: nf4_peer.py [threads]

The library is called by ctypes, so neither torch nor a GPU is needed. A nested row is its two kernels and an addition,
as bitsandbytes.functional.dequantize_4bit does it.
"""

import ctypes
import importlib.util
import json
import os
import pathlib
import sys
import time

threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
os.environ["OMP_NUM_THREADS"] = str(threads)  # read when the library is loaded

import numpy as np

ROUNDS_LARGE, ROUNDS_SMALL = 15, 300


def load():
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None:
        sys.exit("nf4_peer.py: bitsandbytes is not installed; pip install --no-deps bitsandbytes==0.50.2")
    return ctypes.CDLL(str(pathlib.Path(spec.origin).parent / "libbitsandbytes_cpu.so"))


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def bench(lib, rows, cols, dtype, scales):
    n = rows * cols
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, n // 2, dtype=np.uint8)
    nested_codes = random.integers(0, 256, n // 64, dtype=np.uint8)
    nested_absmax = np.full(-(-n // 64 // 256), 0.1, np.float32)
    nested_values = np.linspace(-1, 1, 256, dtype=np.float32)
    absmax = np.full(n // 64, 0.5, np.float32)
    out = np.zeros(n, np.float32 if dtype == "float32" else np.uint16)
    decode = getattr(lib, f"cdequantize_blockwise_cpu_nf4_{'fp32' if dtype == 'float32' else 'bf16'}")
    size = ctypes.c_longlong

    def run():
        if scales == "nested":
            lib.cdequantize_blockwise_cpu_fp32(
                pointer(nested_values), pointer(nested_codes), pointer(nested_absmax), pointer(absmax), size(256),
                size(n // 64))
            np.add(absmax, np.float32(0.5), out=absmax)
        decode(pointer(codes), pointer(absmax), pointer(out), size(64), size(rows), size(cols))

    times = []
    for _ in range(ROUNDS_LARGE if n > 1 << 24 else ROUNDS_SMALL):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    print(json.dumps({"bench": "nf4_dequantize", "peer": "bitsandbytes", "rows": rows, "cols": cols, "dtype": dtype,
                      "scales": scales, "threads": threads, "peer_ms": round(min(times) * 1e3, 4)}))


if __name__ == "__main__":
    library = load()
    for dtype in ("float32", "bfloat16"):
        for scales in ("plain", "nested"):
            bench(library, 14336, 4096, dtype, scales)
            bench(library, 1536, 576, dtype, scales)
