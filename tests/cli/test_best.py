"""eval.load_best_model_at_end: the adapter with the lowest held-out loss is kept, and wins."""

from __future__ import annotations

import json
import shutil

import h5py
import numpy as np
import pytest
from graft_cli import ORACLE, STEPS, adapter, checkpoints, flip_a_byte, graft, metrics, succeed, write_rows
from safetensors.numpy import load_file, save_file

NO_CHECKPOINT = 6


def best_of(run, after=0):
    """The step of the lowest eval loss, and its checkpoint."""
    evaluations = {line["step"]: line["eval_loss"] for line in metrics(run) if line["step"] > after}
    best = min(evaluations, key=evaluations.get)
    return best, run / f"checkpoints/step-{best:08d}"


@pytest.fixture
def evaluated(long_run, tmp_path):
    """A run whose loss on rows never seen rises at this rate sooner or later: the last step is not the best one."""
    write_rows(tmp_path / "held_out.h5", [20, 20], seed=1)
    return long_run(f'data.eval=["{tmp_path}/held_out.h5"]', "checkpoint.save_total_limit=1",
                    'eval={"eval_steps": 1, "load_best_model_at_end": true}')


def test_the_best_adapter_is_kept_and_wins(evaluated):
    succeed("train", evaluated)
    run = evaluated.parent / "run"
    best, kept = best_of(run)
    assert best < STEPS
    assert adapter(run) == (kept / "adapter_model.safetensors").read_bytes()
    assert json.loads((kept / "trainer.json").read_text())["best_step"] == best

    before = adapter(run)
    flip_a_byte(kept)
    done = graft("train", evaluated)
    assert done.returncode == NO_CHECKPOINT and "adapter_model.safetensors has another hash" in done.stderr
    assert adapter(run) == before

    shutil.rmtree(kept)
    done = succeed("train", evaluated, f"train.max_steps={STEPS + 2}")
    assert f"the checkpoint of step {best}, the best so far, is lost" in done.stderr
    assert adapter(run) == (best_of(run, after=STEPS)[1] / "adapter_model.safetensors").read_bytes()


def test_the_best_adapter_may_be_asked_for_later(evaluated):
    run = evaluated.parent / "run"
    succeed("train", evaluated, "eval.load_best_model_at_end=false")
    assert best_of(run)[0] < STEPS
    succeed("train", evaluated, f"train.max_steps={STEPS + 2}")
    assert adapter(run) == (best_of(run, after=STEPS)[1] / "adapter_model.safetensors").read_bytes()


def test_a_loss_that_is_no_number_is_never_the_best(long_run, tmp_path):
    """Only the held-out rows hold the token whose embedding is broken."""
    shutil.copytree(ORACLE / "qwen3/model", tmp_path / "model")
    for shard in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(shard)
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"][127] = np.nan
            save_file(tensors, shard, {"format": "pt"})
    for name, replaced in (("train", 0), ("eval", 127)):
        write_rows(tmp_path / f"{name}.h5", [9, 24, 5])
        with h5py.File(tmp_path / f"{name}.h5", "r+") as file:
            tokens = file["tokens"][:]
            tokens[(tokens == 127) | (tokens == tokens[2])] = replaced
            file["tokens"][:] = tokens
    path = long_run(f'model.name_or_path="{tmp_path}/model"', f'data.train=["{tmp_path}/train.h5"]', "train.max_steps=2",
                    f'data.eval=["{tmp_path}/eval.h5"]', 'eval={"eval_steps": 1, "load_best_model_at_end": true}')
    for steps in (2, 3):
        done = succeed("train", path, f"train.max_steps={steps}")
        assert "no evaluation gave a finite loss" in done.stderr
    assert [line["eval_loss"] for line in metrics(path.parent / "run")] == [None] * 3
