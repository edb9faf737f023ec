"""graft train after a signal, on other ranks, after damage or a change: goes on where it was, to the same bits, or says
why it cannot.

The oracle is the uninterrupted run.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import shutil
import signal

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from graft_cli import (MODEL, STEPS, Job, adapter, assert_same_run, checkpoints, files_of, flip_a_byte, graft, lanes,
                       metrics, succeed, write_rows)

PREEMPTED, USAGE, DATA, NO_CHECKPOINT = 75, 2, 3, 6


# --- signals and other rank counts -------------------------------------------------------------------------------

def test_a_signal_saves_and_exits_75_and_the_run_goes_on(long_run):
    path = long_run("checkpoint.save_steps=0", "train.max_steps=100000")
    run, stopped = path.parent / "run", 0
    for number in (signal.SIGUSR1, signal.SIGTERM):
        with Job("train", path) as job:
            assert job.wait_for_step(run, stopped + 3)
            job.kill_ranks(number)
            done = job.wait()
        assert done.returncode == PREEMPTED, done.stderr
        stopped = metrics(run)[-1]["step"]
        assert checkpoints(run)[-1].name == f"step-{stopped:08d}"
        assert [line["step"] for line in metrics(run)] == list(range(1, stopped + 1))
        assert not (run / "adapter").exists()


def test_mpirun_passes_the_signal_on(long_run):
    path = long_run(lanes(2), "checkpoint.save_steps=0", "train.max_steps=100000")
    with Job("train", path, ranks=2) as job:
        assert job.wait_for_step(path.parent / "run", 2)
        job.process.send_signal(signal.SIGUSR1)
        assert job.wait().returncode == PREEMPTED
    assert len(checkpoints(path.parent / "run")) == 1


def test_a_run_goes_on_with_the_same_file_on_other_rank_counts_to_the_same_bits(long_run, reference):
    """The accumulation follows the ranks, so that a step keeps its four lanes; also when the same job is requeued."""
    path = long_run()
    run = path.parent / "run"
    for ranks, step in ((1, 5), (2, 10), (2, 15)):
        done_before = max((line["step"] for line in metrics(run)), default=0)
        with Job("train", path, ranks=ranks) as job:
            assert job.wait_for_step(run, max(step, done_before + 1))  # a step of this job, not of the one before
            job.kill_ranks(signal.SIGUSR1)
            done = job.wait()
        assert done.returncode == PREEMPTED, done.stderr
        assert ("train.gradient_accumulation_steps: 2 instead of 4" in done.stderr) == (ranks == 2)
        assert step <= metrics(run)[-1]["step"] < STEPS
    done = graft("train", path, ranks=3)
    assert done.returncode == USAGE and "4 micro-batches, which 3 ranks cannot share evenly" in done.stderr
    succeed("train", path, lanes(4), ranks=4)  # by hand is right too
    assert_same_run(run, reference)


@pytest.mark.parametrize("held", [
    ['"method": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"'],
    ['"method": "full"', 'model.quantization="none"', "train.learning_rate=1e-3"]])
def test_l2_sp_goes_on_around_the_start_it_had(long_run, held):
    method, *others = held
    overrides = [f'peft=[{{{method}}}, {{"method": "l2_sp", "alpha": 50}}]', *others]
    alone = long_run(*overrides, folder="alone")
    succeed("train", alone)
    path = long_run(*overrides)
    with Job("train", path) as job:
        assert job.wait_for_step(path.parent / "run", 6)
        job.kill_ranks()
    assert "resumed from" in succeed("train", path, ranks=2).stderr
    assert_same_run(path.parent / "run", alone.parent / "run")


# --- damage ------------------------------------------------------------------------------------------------------

def remove_manifest(checkpoint):
    (checkpoint / "MANIFEST.json").unlink()


def truncate_state(checkpoint):
    with open(checkpoint / "state-0-of-1.safetensors", "r+b") as file:
        file.truncate(100)


def remove_trainer(checkpoint):
    (checkpoint / "trainer.json").unlink()


@pytest.mark.parametrize("damage, said", [(flip_a_byte, "adapter_model.safetensors has another hash"),
                                          (remove_manifest, "no MANIFEST.json"),
                                          (truncate_state, "state-0-of-1.safetensors has 100 bytes"),
                                          (remove_trainer, "trainer.json is missing")])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(long_run, reference, damage, said):
    path = long_run()
    run = path.parent / "run"
    shutil.copytree(reference, run)
    before, newest = checkpoints(run)
    damage(newest)
    done = succeed("train", path)
    assert done.stderr.count("checkpoints passed over") == 1 and said in done.stderr
    assert f"resumed from {before}" in done.stderr
    assert_same_run(run, reference)


def test_no_good_checkpoint_exits_6_and_touches_nothing(long_run, reference):
    path = long_run(lanes(2))
    run = path.parent / "run"
    shutil.copytree(reference, run)
    for checkpoint in checkpoints(run):
        flip_a_byte(checkpoint)
    kept = metrics(run)
    done = graft("train", path, ranks=2)
    assert done.returncode == NO_CHECKPOINT
    assert done.stderr.count("no checkpoint can be loaded") == 1
    assert metrics(run) == kept and adapter(run) == adapter(reference) and len(checkpoints(run)) == 2


class Hash128(ctypes.Structure):
    _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]


@pytest.mark.parametrize("changes, code, said", [
    ({"format": 9}, NO_CHECKPOINT, "format 9 is not known"),
    ({"inputs": True}, DATA, "trainer.json: inputs is boolean, expected an object"),
    ({"skipped_documents": ["one"]}, DATA, "trainer.json: skipped_documents holds a string, expected integers"),
])
def test_a_whole_checkpoint_with_another_content_is_refused(finished, changes, code, said):
    """As a later version, or somebody, would write it: its manifest holds the right hash."""
    newest = checkpoints(finished.parent / "run")[-1]
    text = json.dumps(json.loads((newest / "trainer.json").read_text()) | changes).encode()
    (newest / "trainer.json").write_bytes(text)
    xxh3 = ctypes.CDLL(ctypes.util.find_library("xxhash")).XXH3_128bits
    xxh3.argtypes, xxh3.restype = [ctypes.c_char_p, ctypes.c_size_t], Hash128
    digest = xxh3(text, len(text))
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    manifest["files"]["trainer.json"] = {"bytes": len(text), "xxh3_128": f"{digest.high:016x}{digest.low:016x}"}
    (newest / "MANIFEST.json").write_text(json.dumps(manifest))
    done = graft("train", finished)
    assert done.returncode == code and said in done.stderr


@pytest.mark.parametrize("limit", [1, 2])
def test_a_checkpoint_that_was_passed_over_ousts_no_good_one(long_run, limit):
    path = long_run("checkpoint.save_total_limit=null", "checkpoint.save_steps=10")
    run = path.parent / "run"
    succeed("train", path)
    _, good, newest = checkpoints(run)
    flip_a_byte(newest)
    shutil.copytree(newest, run / "checkpoints/step-00099999")  # ahead of every step to come
    with Job("train", path, "train.max_steps=99999", "checkpoint.save_steps=0",
             f"checkpoint.save_total_limit={limit}") as job:
        assert job.wait_for_step(run, 33)
        job.kill_ranks(signal.SIGUSR1)
        assert job.wait().returncode == PREEMPTED
    reached = f"step-{metrics(run)[-1]['step']:08d}"
    assert [checkpoint.name for checkpoint in checkpoints(run)] == [good.name, reached][-limit:]


def test_folders_of_the_user_are_neither_resumed_nor_removed(finished):
    run = finished.parent / "run"
    before, newest = checkpoints(run)
    for name in ("step-00000004-keep", "step-backup"):
        shutil.copytree(before, run / "checkpoints" / name)
    before.rename(run / "checkpoints/step-25")  # numbers are ordered as numbers
    done = succeed("train", finished, f"train.max_steps={STEPS + 1}", "checkpoint.save_total_limit=1")
    assert f"resumed from {newest}" in done.stderr
    assert [path.name for path in checkpoints(run)] == ["step-00000004-keep", f"step-{STEPS + 1:08d}", "step-backup"]


# --- what may change ---------------------------------------------------------------------------------------------

def refused(path, *arguments):
    """Exit 2 and nothing changed; returns what was said."""
    run = path.parent / "run"
    kept = metrics(run), adapter(run), [c.name for c in checkpoints(run)]
    done = graft("train", path, *arguments)
    assert done.returncode == USAGE, done.stderr
    assert (metrics(run), adapter(run), [c.name for c in checkpoints(run)]) == kept
    return done.stderr


def test_a_changed_learning_rate_is_refused_by_name(finished):
    said = refused(finished, "train.learning_rate=0.02", "data.max_length=20", f"train.max_steps={STEPS + 1}")
    assert "train.learning_rate: 0.01 -> 0.02" in said and "data.max_length: 24 -> 20" in said
    assert "max_steps" not in said


def test_a_changed_method_is_refused_by_name(finished):
    said = refused(finished, "peft.0.r=8")
    assert "r: 4 -> 8" in said


def test_a_smaller_max_steps_is_refused(finished):
    assert f"a run of {STEPS} steps, this one has {STEPS - 1}" in refused(finished, f"train.max_steps={STEPS - 1}")


@pytest.mark.parametrize("spoil, said", [
    (lambda folder: write_rows(folder / "rows-1.h5", [5]), "the files changed"),
    (lambda folder: write_rows(folder / "rows-0.h5", [9, 7, 8]), "the files changed"),
    (lambda folder: write_rows(folder / "rows-0.h5", [9, 8, 7], seed=99), "the files changed"),
    (lambda folder: write_rows(folder / "rows-0.h5", [9, 8, 7], tokenizer_sha256="1" * 64), "the files changed")])
def test_other_rows_under_the_same_glob_are_refused(long_run, tmp_path, spoil, said):
    write_rows(tmp_path / "rows-0.h5", [9, 8, 7])
    path = long_run(f'data.train=["{tmp_path}/rows-*.h5"]', "train.max_steps=2")
    succeed("train", path)
    spoil(tmp_path)
    done = graft("train", path, "train.max_steps=4")
    assert done.returncode == DATA and said in done.stderr
    assert len(metrics(path.parent / "run")) == 2


def test_another_frozen_adapter_under_the_same_path_is_refused(long_run, tmp_path):
    below = long_run("train.max_steps=1").parent / "run/adapter"
    succeed("train", below.parents[1] / "run.yaml")
    path = long_run(f'model.adapters=["{below}"]', f'checkpoint.output_dir="{tmp_path}/above"', "train.max_steps=2")
    succeed("train", path)
    file = below / "adapter_model.safetensors"
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    save_file({name: 3 * value for name, value in load_file(file).items()}, file, metadata)
    done = graft("train", path, "train.max_steps=4")
    assert done.returncode == DATA and "model.adapters: the files changed" in done.stderr


def test_a_conflict_is_told_before_the_weights_are_read(long_run, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    path = long_run(f'model.name_or_path="{tmp_path}/model"', "train.max_steps=2")
    succeed("train", path)
    for shard in (tmp_path / "model").glob("*.safetensors"):
        shard.write_bytes(b"")
    for change in ("train.learning_rate=0.02", "train.max_steps=1", "train.gradient_accumulation_steps=2"):
        refused(path, change)


def test_fewer_epochs_are_told_before_the_weights_are_read(long_run, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    path = long_run(f'model.name_or_path="{tmp_path}/model"', "train.max_steps=null", "train.num_train_epochs=3")
    succeed("train", path)
    steps = len(metrics(path.parent / "run"))
    succeed("train", path, "train.num_train_epochs=4")
    longer = len(metrics(path.parent / "run"))
    assert longer > steps
    for shard in (tmp_path / "model").glob("*.safetensors"):
        shard.write_bytes(b"")
    said = refused(path, "train.num_train_epochs=3")
    assert f"a run of {longer} steps, this one has {steps}" in said


def test_a_method_named_by_its_adapter_alone_is_resumed(long_run, finished):
    path = long_run(f'peft=[{{"init_from": "{finished.parent}/run/adapter"}}]', "train.max_steps=2", folder="second")
    succeed("train", path)
    assert "resumed from" in succeed("train", path, "train.max_steps=3").stderr


def test_lanes_that_differ_are_refused(finished):
    assert "set the accumulation to 4" in refused(finished, "train.gradient_accumulation_steps=2")


def test_resume_never_refuses_a_folder_with_a_run(finished):
    assert "holds a run already" in refused(finished, "--resume", "never")


def only_adapter(run):
    (run / "metrics.jsonl").unlink()
    (run / "config.yaml").unlink()


def only_metrics(run):
    shutil.rmtree(run / "adapter")
    (run / "config.yaml").unlink()


def only_other_config(run):
    shutil.rmtree(run / "adapter")
    (run / "metrics.jsonl").unlink()
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("seed: 42", "seed: 43"))


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("leave, said", [(only_adapter, "adapter/"), (only_metrics, "metrics.jsonl"),
                                         (only_other_config, "train.seed: 43 -> 42")])
def test_a_folder_with_what_another_run_left_is_refused(finished, leave, said, resume):
    run = finished.parent / "run"
    shutil.rmtree(run / "checkpoints")
    leave(run)
    kept = {name: data for name, data in files_of(run).items() if not name.startswith("logs")}
    done = graft("train", finished, "--resume", resume)
    assert done.returncode == USAGE and said in done.stderr and "another checkpoint.output_dir" in done.stderr
    assert {name: data for name, data in files_of(run).items() if not name.startswith("logs")} == kept


def test_a_run_killed_before_its_first_checkpoint_starts_again(long_run, reference):
    path = long_run("checkpoint.save_steps=0")
    with Job("train", path, "train.max_steps=100000") as job:
        assert job.wait_for_step(path.parent / "run", 3)
        job.kill_ranks()
    succeed("train", path, "--resume", "never")
    assert_same_run(path.parent / "run", reference)


def test_a_larger_max_steps_goes_on(finished):
    succeed("train", finished, f"train.max_steps={STEPS + 5}", "log.logging_steps=1", "checkpoint.save_total_limit=1")
    assert [line["step"] for line in metrics(finished.parent / "run")] == list(range(1, STEPS + 6))
    assert len(checkpoints(finished.parent / "run")) == 1


def test_a_finished_run_started_again_says_so_and_changes_nothing(finished, reference):
    done = succeed("train", finished)
    assert done.stderr.count("this run has finished already") == 1
    assert_same_run(finished.parent / "run", reference)


def test_resume_from_a_named_checkpoint_branches_off(finished, reference, tmp_path):
    before, _ = checkpoints(finished.parent / "run")
    done = succeed("train", finished, f"checkpoint.output_dir={tmp_path}/branch", "--resume", before)
    assert f"resumed from {before}" in done.stderr
    assert adapter(tmp_path / "branch") == adapter(reference)


def test_an_older_checkpoint_of_the_same_folder_is_refused(finished, reference):
    before, _ = checkpoints(finished.parent / "run")
    done = graft("train", finished, "--resume", before)
    assert done.returncode == USAGE
    assert "to branch off, choose another checkpoint.output_dir" in done.stderr
    assert_same_run(finished.parent / "run", reference)
