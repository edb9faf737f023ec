"""Methods that train the base's own tensors (full, freeze_layers): what a run leaves, resume on other ranks, and use.

Oracles: the uninterrupted run, and transformers on the merged folder and on the base with the adapter's tensors in it.
"""

from __future__ import annotations

import shutil
import signal

import pytest
import torch
import transformers
from graft_cli import (MODEL, STEPS, Job, adapter, assert_same_run, checkpoints, graft, lanes, losses, metrics, succeed,
                       write_config)
from safetensors.torch import load_file

FULL = 'peft=[{"method": "full"}]'
TOP = 'peft=[{"method": "freeze_layers", "num_layers": 1, "final_norm": true}]'
PLAIN = 'model.quantization="none"'
SLOW = "train.learning_rate=1e-3"
PREEMPTED, USAGE = 75, 2


def logits_of(path, run, *flags):
    succeed("eval", path, "--logits", run / "logits.safetensors", *flags)
    rows = load_file(run / "logits.safetensors")
    return [rows[f"row.{i}"] for i in range(len(rows))]


def assert_close(ours, theirs):
    for mine, row in zip(ours, theirs, strict=True):
        assert (mine - row).abs().max() < 1e-4


def transformers_logits(model, rows):
    import h5py
    with h5py.File(rows) as file:
        offsets, tokens = file["offsets"][:], torch.from_numpy(file["tokens"][:].astype("int64"))
    with torch.no_grad():
        return [model(tokens[begin:end][None]).logits[0] for begin, end in zip(offsets, offsets[1:], strict=False)]


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("method", [FULL, TOP])
def test_transformers_computes_our_logits_from_what_a_run_leaves(rows, tmp_path, method):
    """The adapter's tensors put over the base's, the merged folder, `eval` and an `init_from` are all one model."""
    path = write_config(tmp_path / "run.yaml", rows, method, PLAIN, SLOW)
    succeed("train", path)
    run = tmp_path / "run"
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    model = load(MODEL)
    left = model.load_state_dict(tensors, strict=False)
    assert not left.unexpected_keys
    assert len(tensors) == (1 + 2 * 9 + 1 if method == FULL else 9 + 1)
    expected = transformers_logits(model, rows)
    before = transformers_logits(load(MODEL), rows)
    assert max((a - b).abs().max() for a, b in zip(expected, before, strict=True)) > 1e-2

    assert_close(logits_of(path, run), expected)
    succeed("merge", "--model", MODEL, "--adapter", run / "adapter", "--output", tmp_path / "merged")
    assert_close(transformers_logits(load(tmp_path / "merged"), rows), expected)
    shutil.copytree(run / "adapter", tmp_path / "start")
    again = write_config(tmp_path / "again.yaml", rows, f'peft=[{{"init_from": "{tmp_path / "start"}"}}]', PLAIN, SLOW,
                         f'checkpoint.output_dir="{tmp_path / "again"}"')
    succeed("train", again)
    assert losses(tmp_path / "again")[0] < losses(run)[0]


def test_a_killed_run_goes_on_at_other_world_sizes_to_the_same_bits(long_run):
    options = (FULL, PLAIN, SLOW)
    reference = long_run(*options, folder="reference")
    succeed("train", reference)
    path = long_run(*options)
    run = path.parent / "run"
    for ranks, step in ((1, 6), (2, 14)):
        with Job("train", path, ranks=ranks) as job:
            assert job.wait_for_step(run, step)
            job.kill_ranks(signal.SIGUSR1)
            assert job.wait().returncode == PREEMPTED
    assert {f.name for f in checkpoints(run)[-1].glob("state-*")} == {f"state-{r}-of-2.safetensors" for r in (0, 1)}
    succeed("train", path, lanes(4), ranks=4)
    assert_same_run(run, reference.parent / "run")
    assert [line["grad_norm"] for line in metrics(run)] == [
        line["grad_norm"] for line in metrics(reference.parent / "run")]


def test_ranks_hold_their_share_of_the_moments(rows, tmp_path):
    path = write_config(tmp_path / "run.yaml", rows, FULL, PLAIN, lanes(2))
    succeed("train", path, ranks=2)
    sizes = [sum(t.numel() for t in load_file(checkpoints(tmp_path / "run")[-1] / f"state-{r}-of-2.safetensors").values())
             for r in (0, 1)]
    total = sum(t.numel() for t in load_file(tmp_path / "run/adapter/adapter_model.safetensors").values())
    assert sum(sizes) == 2 * total and max(sizes) < 1.1 * total
    assert all(line["bytes_reduced"] > 0 for line in metrics(tmp_path / "run"))


def test_thawed_blocks_are_whole_in_a_quantised_base(rows, tmp_path):
    """Two ranks of one replicated or one cut base leave the same bytes."""
    left = []
    for ranks, shard in ((1, "auto"), (2, "world"), (2, "replicate")):
        path = write_config(tmp_path / f"{shard}{ranks}.yaml", rows, TOP, SLOW, lanes(ranks), f'parallel.shard="{shard}"',
                            f'checkpoint.output_dir="{tmp_path / (shard + str(ranks))}"')
        succeed("train", path, ranks=ranks)
        left.append(adapter(tmp_path / (shard + str(ranks))))
        succeed("eval", path)
    assert left[0] == left[1] == left[2]


@pytest.mark.parametrize("overrides, said", [
    ([FULL], "model.quantization: nf4 has nothing to quantise"),
    ([TOP, "parallel.lanes_per_gather=1"], "parallel.lanes_per_gather = 1: thawed weights take all 4"),
    (['peft=[{"method": "freeze_layers", "num_layers": 9}]'], "num_layers = 9, the model has 2"),
    (['peft=[{"method": "lora"}, {"method": "full"}]', PLAIN], "is trained whole, and"),
    (['peft=[{"method": "full"}, {"method": "freeze_layers"}]', PLAIN], "is thawed by two methods"),
])
def test_what_cannot_be_is_refused_with_what_to_do(rows, tmp_path, overrides, said):
    done = graft("train", write_config(tmp_path / "run.yaml", rows, *overrides))
    assert done.returncode == USAGE and said in done.stderr, done.stderr


def test_no_step_of_a_long_run_was_left_out(long_run):
    path = long_run(TOP, SLOW, "eval.eval_steps=10", "eval.load_best_model_at_end=true")
    succeed("train", path)
    assert len(metrics(path.parent / "run")) == STEPS
