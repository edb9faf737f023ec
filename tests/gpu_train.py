"""A short training run on a GPU, on one rank and on two, held against the same run on the CPU.

SmolLM2-135M's shape with random weights in NF4, LoRA on all linears, 20 steps of four rows of random tokens.
usage: GRAFT_BINARY_DIR=build/cuda python tests/gpu_train.py FOLDER      exit 1: a run failed, or its losses are others
"""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "cli"))
from graft_cli import GRAFT, ROOT, lanes, metrics, write_config, write_rows

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
MODEL = ROOT / "configs/models/smollm2_135m.yaml"
TRAIN = [f'model.name_or_path="{MODEL}"', 'model.weights="random"', "data.max_length=64", "data.eval=[]", "train.max_steps=20",
         "train.learning_rate=1e-3", f"parallel.threads_per_rank={max(1, os.cpu_count() // 2)}"]
FLOAT32, BFLOAT16 = 'model.dtype="float32"', 'model.dtype="bfloat16"'
# name: ranks, environment, overrides, the run it is held against, the largest relative difference of a step's loss. The
# tree sums the same numbers in the same order on any number of ranks; rounding differs from device to device.
RUNS = {
    "cpu float32": (1, NO_GPU, [FLOAT32], None, 0),
    "gpu float32": (1, {}, [FLOAT32], "cpu float32", 1e-4),
    "gpu float32, 2 ranks": (2, {}, [FLOAT32], "gpu float32", 1e-5),
    "gpu bfloat16": (1, {}, [BFLOAT16], "cpu float32", 2e-3),
    "gpu bfloat16, 2 ranks, nccl": (2, {}, [BFLOAT16, 'parallel.reduction="nccl"'], "gpu bfloat16", 2e-3),
}


def train(folder, rows, ranks, environment, overrides):
    """The losses of a run; ends the program if the run fails or is not where it should be."""
    folder.mkdir(parents=True)
    config = write_config(folder / "run.yaml", rows, *TRAIN, *overrides, lanes(ranks))
    launcher = [ROOT / "cluster/mpirun.sh", "-np", str(ranks)] if ranks > 1 else []
    done = subprocess.run([*launcher, GRAFT, "train", config, "--resume", "never"], env=os.environ | environment, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=200)
    if done.returncode != 0:
        sys.exit(f"{folder}: exit {done.returncode}\n{done.stdout}")
    record = json.loads((folder / "run/run.json").read_text())
    device = "cpu" if environment is NO_GPU else "cuda"
    if not record["device"].startswith(device) or record["world"] != ranks:
        sys.exit(f"{folder}: ran on {record['device']} with {record['world']} ranks, expected {device} with {ranks}")
    return [line["loss"] for line in metrics(folder / "run")]


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.h5"
    write_rows(rows, [17, 64, 31, 9, 40, 23] * 32)  # packed: the GPU masks documents, the CPU takes them one by one
    losses, failed = {}, False
    for name, (ranks, environment, overrides, reference, allowed) in RUNS.items():
        losses[name] = mine = train(folder / name.replace(",", "").replace(" ", "-"), rows, ranks, environment, overrides)
        line = f"{name:28} loss {mine[0]:.6f} to {mine[-1]:.6f}"
        good = len(mine) == 20 and mine[-1] < mine[0]
        if reference:
            difference = max(abs(a / b - 1) for a, b in zip(mine, losses[reference], strict=True))
            line += f", off {reference} by {difference:.1e} of {allowed:.0e}"
            good = good and difference <= allowed
        print(line if good else line + "  FAILED", flush=True)
        failed = failed or not good
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
