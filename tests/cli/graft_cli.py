"""Shared by the tests of the built program: tiny models and rows, and ways to run `graft` as a user does.

GRAFT_BINARY_DIR holds the program, GRAFT_ORACLE_DIR what tests/oracle/make_fixtures.py wrote.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
GRAFT = Path(os.environ.get("GRAFT_BINARY_DIR", ROOT / "build/release")) / "graft"
ORACLE = Path(os.environ.get("GRAFT_ORACLE_DIR", ROOT / "build/release/oracle"))
MODEL = ORACLE / "llama_tied" / "model"
VOCABULARY = 128
LENGTHS = [9, 24, 5, 17, 12, 3, 21]  # of the documents of `rows`: odd, ragged, none longer than max_length
STEPS = 30  # of a long run
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
MPIRUN = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np"]


def write_rows(path, lengths, seed=0, **attributes):
    """A shard of random documents; the first third of each is no target. Returns the documents and their masks."""
    random = np.random.default_rng(seed)
    documents = [random.integers(0, VOCABULARY, length).astype(np.uint32) for length in lengths]
    masks = [(np.arange(length) >= max(1, length // 3)).astype(np.uint8) for length in lengths]
    with h5py.File(path, "w") as file:
        file.attrs.update({"graft_schema": 1, "kind": "tokens", "num_samples": len(lengths), "created_by": "test",
                           "tokenizer_sha256": "0" * 64, "vocab_size": VOCABULARY} | attributes)
        file["tokens"] = np.concatenate(documents)
        file["offsets"] = np.cumsum([0, *lengths]).astype(np.uint64)
        file["loss_mask"] = np.concatenate(masks)
    return documents, masks


def write_config(path, rows, *overrides):
    """A run of four steps of four lanes on one rank, all of it in the folder of `path`. Overrides: "section.key=value"."""
    config = {
        "schema": 1,
        "model": {"name_or_path": str(MODEL)},
        "data": {"train": [str(rows)], "eval": [str(rows)], "max_length": 24},
        "peft": [{"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}],
        "train": {"max_steps": 4, "gradient_accumulation_steps": 4, "learning_rate": 1e-2, "warmup_ratio": 0.0,
                  "lr_scheduler_type": "constant"},
        "parallel": {"threads_per_rank": 1, "reduction": "tree"},
        "checkpoint": {"output_dir": str(path.parent / "run"), "save_steps": 0},
    }
    for override in overrides:
        keys, value = override.split("=", 1)
        *sections, key = keys.split(".")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = json.loads(value)
    path.write_text(json.dumps(config, indent=1))
    return path


def write_long_run(folder, rows, *overrides):
    """A run of four lanes on one rank, with dropout, a schedule and a checkpoint every fifth step."""
    folder.mkdir(exist_ok=True)
    return write_config(folder / "run.yaml", rows, f"train.max_steps={STEPS}", "checkpoint.save_steps=5",
                        'train.lr_scheduler_type="cosine"', "train.warmup_ratio=0.1",
                        'peft=[{"method": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}]', *overrides)


def lanes(ranks):
    """The override by which a step keeps its four lanes."""
    return f"train.gradient_accumulation_steps={4 // ranks}"


def command(*arguments, ranks=1):
    launcher = [*MPIRUN, str(ranks)] if ranks > 1 else []
    return [*launcher, str(GRAFT), *map(str, arguments)]


class Job:
    """`graft` in a process group of its own; leaving the `with` block ends what is left of it."""

    def __init__(self, *arguments, ranks=1, wrapped=None):
        self.process = subprocess.Popen(wrapped or command(*arguments, ranks=ranks), text=True, start_new_session=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | AS_ROOT)
        self.ranks = ranks

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.kill_ranks()
        self.process.communicate()

    def rank_pids(self):
        if self.ranks == 1:
            return [self.process.pid]
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()] if children.exists() else []

    def kill_ranks(self, number=signal.SIGKILL):
        for pid in self.rank_pids():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass  # it has just ended by itself

    def wait_for_step(self, run, step, seconds=30):
        """Until the run has logged `step`; False if the job ended before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if any(line["step"] >= step for line in metrics(run)):
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        raise TimeoutError(f"{run} did not reach step {step} in {seconds} s")

    def wait(self, seconds=60):
        out, err = self.process.communicate(timeout=seconds)
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, out, err)


def graft(*arguments, ranks=1, seconds=60):
    """Runs to the end; a hang is subprocess.TimeoutExpired."""
    with Job(*arguments, ranks=ranks) as job:
        return job.wait(seconds)


def succeed(*arguments, **options):
    done = graft(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done


def metrics(run):
    """The whole lines of metrics.jsonl so far."""
    path = Path(run) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(run):
    return [line["loss"] for line in metrics(run)]


def adapter(run):
    return (Path(run) / "adapter/adapter_model.safetensors").read_bytes()


def checkpoints(run):
    return sorted(path for path in (Path(run) / "checkpoints").glob("step-*"))


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip_a_byte(checkpoint):
    file = checkpoint / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def assert_same_run(run, reference):
    """Byte-equal adapters, and one line for each step of a long run with the same loss."""
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(reference)]
    assert [line["tokens"] for line in metrics(run)] == [line["tokens"] for line in metrics(reference)]
    assert adapter(run) == adapter(reference)
