"""graft train after a kill, a signal or damage: goes on where it was, to the same bits, or says why it cannot.

The oracle is the uninterrupted run.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import os
import random
import shutil
import signal

import h5py
import numpy as np
import pytest
from graft_cli import (GRAFT, MODEL, ORACLE, Job, adapter, checkpoints, graft, metrics, succeed, write_config,
                       write_rows)
from safetensors.numpy import load_file, save_file

STEPS = 30
MANY = 200  # more steps than the kills of a test leave time for
PREEMPTED, USAGE, DATA, NO_CHECKPOINT = 75, 2, 3, 6


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.h5"
    write_rows(path, [9, 24, 5, 17, 12, 3, 21])
    return path


def write_run(folder, rows, *overrides):
    """A run of four lanes on one rank, with dropout, a schedule and a checkpoint every fifth step."""
    folder.mkdir(exist_ok=True)
    return write_config(folder / "run.yaml", rows, f"train.max_steps={STEPS}", "checkpoint.save_steps=5",
                        'train.lr_scheduler_type="cosine"', "train.warmup_ratio=0.1",
                        'peft=[{"method": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}]', *overrides)


@pytest.fixture
def config(tmp_path, rows):
    """config(override...) -> the path of such a run's file."""
    return lambda *overrides, folder="job": write_run(tmp_path / folder, rows, *overrides)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, rows):
    """The folder of the uninterrupted run on one rank. Only to look at."""
    path = write_run(tmp_path_factory.mktemp("reference"), rows)
    succeed("train", path)
    return path.parent / "run"


def assert_same_run(run, reference):
    """Byte-equal adapters, and one line for each step with the same loss."""
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(reference)]
    assert [line["tokens"] for line in metrics(run)] == [line["tokens"] for line in metrics(reference)]
    assert adapter(run) == adapter(reference)


def lanes(ranks):
    return f"train.gradient_accumulation_steps={4 // ranks}"


# --- kills -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_at_random_steps_then_resume_gives_the_same_bits(config, reference, ranks):
    path = config(lanes(ranks))
    run = path.parent / "run"
    kills, rng = 0, random.Random(ranks)
    for step in (2, 6, 9, 14, 23):
        with Job("train", path, ranks=ranks) as job:
            if job.wait_for_step(run, step):
                if rng.random() < 0.5:
                    job.process.kill()  # mpirun first: its ranks are orphans for a moment
                job.kill_ranks()
                kills += job.wait().returncode != 0
    assert kills >= 3
    succeed("train", path, ranks=ranks)
    assert_same_run(run, reference)


def test_one_dead_rank_ends_the_job(config):
    path = config(lanes(4), "train.max_steps=100000")
    with Job("train", path, ranks=4) as job:
        assert job.wait_for_step(path.parent / "run", 3)
        os.kill(job.rank_pids()[2], signal.SIGKILL)
        assert job.wait(30).returncode != 0


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Traced:
    """A command under strace, to be killed at one of its system calls."""

    CALLS = "mkdir,write,fsync,rename,unlinkat,rmdir"

    def __init__(self, folder, *arguments):
        self.trace, self.command = folder / "trace.txt", [str(GRAFT), *map(str, arguments)]

    def run(self, *arguments, kill_at=None):
        injection = ["-e", "inject={}:signal=KILL:when={}".format(*kill_at)] if kill_at else []
        with Job(wrapped=["strace", "-f", "-qq", "-o", str(self.trace), "-e", f"trace={self.CALLS}", *injection,
                          *self.command, *arguments]) as job:
            done = job.wait()
        if "ptrace" in done.stderr.lower():
            pytest.skip("strace may not trace here")
        assert done.returncode in ((-signal.SIGKILL, 128 + signal.SIGKILL) if kill_at else (0,)), (kill_at, done.stderr)

    def calls(self, first, last):
        """From the first call that mentions `first` to the last that mentions `last`: its name, and its number as strace
        counts, for each name and thread alone."""
        lines = [line.split(maxsplit=1) for line in self.trace.read_text().splitlines()]
        thread = next(thread for thread, call in lines if first in call)
        mine = [call for own, call in lines if own == thread]
        names = [call.split("(")[0] for call in mine]
        begin = next(i for i, call in enumerate(mine) if first in call)
        end = max(i for i, call in enumerate(mine) if last in call)
        return [(names[i], names[:i + 1].count(names[i])) for i in range(begin, end + 1)]


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


@needs_strace
def test_kill_at_every_write_of_a_save_leaves_a_loadable_checkpoint(config, tmp_path):
    """Each attempt goes on from what the one before left, and is killed one system call later in its first save."""
    small = 'peft=[{"method": "lora", "r": 2, "target_modules": ["layers.0.self_attn.q_proj"]}]'
    steps = ["checkpoint.save_steps=1", "checkpoint.save_total_limit=1", 'train.lr_scheduler_type="constant"',
             "train.warmup_ratio=0.0", small]
    path = config(*steps, "train.max_steps=2")
    run = path.parent / "run"
    succeed("train", path)
    traced = Traced(tmp_path, "train", path)
    traced.run("train.max_steps=3")
    calls = traced.calls(".tmp-step-", "checkpoints/")
    assert len(calls) > 20
    newest = [checkpoints(run)[-1].name]
    for call in calls:
        traced.run(f"train.max_steps={MANY}", kill_at=call)
        newest.append(checkpoints(run)[-1].name)
    assert newest[0] == newest[1] < newest[-1]  # the first kill came before the new one stood, the last after
    succeed("train", path, f"train.max_steps={MANY}")
    uninterrupted = config(*steps, f"train.max_steps={MANY}", "checkpoint.save_steps=0", folder="uninterrupted")
    succeed("train", uninterrupted)
    assert adapter(run) == adapter(uninterrupted.parent / "run")


@needs_strace
def test_kill_at_every_change_of_the_final_adapter_leaves_the_old_or_the_new_one(finished, reference, tmp_path):
    """The old one has two numbered parts, as a run of two methods leaves them: nothing of them may stay."""
    run, old, new = finished.parent / "run", tmp_path / "old", files_of(reference / "adapter")
    for part in "01":
        shutil.copytree(reference / "adapter", old / part)
    traced, left = Traced(tmp_path, "train", finished), []

    def attempt(**options):
        for name in ("adapter", ".tmp-adapter", ".old-adapter"):
            shutil.rmtree(run / name, ignore_errors=True)
        shutil.copytree(old, run / "adapter")
        traced.run(**options)
        left.append(files_of(run / ("adapter" if (run / "adapter").exists() else ".old-adapter")))
    attempt()
    assert left == [new]
    for call in traced.calls("-adapter", "-adapter"):
        if call[0] not in ("write", "fsync"):  # these change no folder
            attempt(kill_at=call)
    assert all(files in (files_of(old), new) for files in left)
    assert left[1] == files_of(old) and left[-1] == new and len(left) > 10


def test_what_a_kill_left_half_done_is_cleared(finished, reference):
    run = finished.parent / "run"
    shutil.copytree(run / "checkpoints/step-00000030", run / "checkpoints/.tmp-step-00000099")
    shutil.copytree(run / "adapter", run / ".tmp-adapter")
    (run / "adapter").rename(run / ".old-adapter")
    assert graft("train", finished, f"train.max_steps={STEPS - 1}").returncode == USAGE
    assert adapter(run) == adapter(reference)  # it stands again, whatever comes
    succeed("train", finished)
    assert adapter(run) == adapter(reference)
    assert not list(run.rglob(".*"))


# --- signals and other rank counts -------------------------------------------------------------------------------

def test_a_signal_saves_and_exits_75_and_the_run_goes_on(config):
    path = config("checkpoint.save_steps=0", "train.max_steps=100000")
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


def test_mpirun_passes_the_signal_on(config):
    path = config(lanes(2), "checkpoint.save_steps=0", "train.max_steps=100000")
    with Job("train", path, ranks=2) as job:
        assert job.wait_for_step(path.parent / "run", 2)
        job.process.send_signal(signal.SIGUSR1)
        assert job.wait().returncode == PREEMPTED
    assert len(checkpoints(path.parent / "run")) == 1


def test_a_run_goes_on_with_the_same_file_on_other_rank_counts_to_the_same_bits(config, reference):
    """The accumulation follows the ranks, so that a step keeps its four lanes; also when the same job is requeued."""
    path = config()
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


# --- damage ------------------------------------------------------------------------------------------------------

def flip_a_byte(checkpoint):
    file = checkpoint / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


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
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(config, reference, damage, said):
    path = config()
    run = path.parent / "run"
    shutil.copytree(reference, run)
    before, newest = checkpoints(run)
    damage(newest)
    done = succeed("train", path)
    assert done.stderr.count("checkpoints passed over") == 1 and said in done.stderr
    assert f"resumed from {before}" in done.stderr
    assert_same_run(run, reference)


def test_no_good_checkpoint_exits_6_and_touches_nothing(config, reference):
    path = config(lanes(2))
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


def test_a_checkpoint_of_an_unknown_format_is_refused(finished):
    """Whole, as a later version would write it: its manifest holds the right hash."""
    newest = checkpoints(finished.parent / "run")[-1]
    text = (newest / "trainer.json").read_text().replace('"format": 1', '"format": 9').encode()
    (newest / "trainer.json").write_bytes(text)
    xxh3 = ctypes.CDLL(ctypes.util.find_library("xxhash")).XXH3_128bits
    xxh3.argtypes, xxh3.restype = [ctypes.c_char_p, ctypes.c_size_t], Hash128
    digest = xxh3(text, len(text))
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    manifest["files"]["trainer.json"] = {"bytes": len(text), "xxh3_128": f"{digest.high:016x}{digest.low:016x}"}
    (newest / "MANIFEST.json").write_text(json.dumps(manifest))
    done = graft("train", finished)
    assert done.returncode == NO_CHECKPOINT and "format 9 is not known" in done.stderr


@pytest.mark.parametrize("limit", [1, 2])
def test_a_checkpoint_that_was_passed_over_ousts_no_good_one(config, limit):
    path = config("checkpoint.save_total_limit=null", "checkpoint.save_steps=10")
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

@pytest.fixture
def finished(config, reference):
    """The config of a run that has ended, a copy of the reference."""
    path = config()
    shutil.copytree(reference, path.parent / "run")
    return path


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
    (lambda folder: write_rows(folder / "rows-0.h5", [9, 8, 7], tokenizer_sha256="1" * 64), "the files changed")])
def test_other_rows_under_the_same_glob_are_refused(config, tmp_path, spoil, said):
    write_rows(tmp_path / "rows-0.h5", [9, 8, 7])
    path = config(f'data.train=["{tmp_path}/rows-*.h5"]', "train.max_steps=2")
    succeed("train", path)
    spoil(tmp_path)
    done = graft("train", path, "train.max_steps=4")
    assert done.returncode == DATA and said in done.stderr
    assert len(metrics(path.parent / "run")) == 2


def test_a_conflict_is_told_before_the_weights_are_read(config, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    path = config(f'model.name_or_path="{tmp_path}/model"', "train.max_steps=2")
    succeed("train", path)
    for shard in (tmp_path / "model").glob("*.safetensors"):
        shard.write_bytes(b"")
    for change in ("train.learning_rate=0.02", "train.max_steps=1", "train.gradient_accumulation_steps=2"):
        refused(path, change)


def test_a_method_named_by_its_adapter_alone_is_resumed(config, finished):
    path = config(f'peft=[{{"init_from": "{finished.parent}/run/adapter"}}]', "train.max_steps=2", folder="second")
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


def test_a_run_killed_before_its_first_checkpoint_starts_again(config, reference):
    path = config("checkpoint.save_steps=0")
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


# --- the best adapter --------------------------------------------------------------------------------------------

def best_of(run, after=0):
    """The step of the lowest eval loss, and its checkpoint."""
    evaluations = {line["step"]: line["eval_loss"] for line in metrics(run) if line["step"] > after}
    best = min(evaluations, key=evaluations.get)
    return best, run / f"checkpoints/step-{best:08d}"


@pytest.fixture
def evaluated(config, tmp_path):
    """A run whose loss on rows never seen rises at this rate sooner or later: the last step is not the best one."""
    write_rows(tmp_path / "held_out.h5", [20, 20], seed=1)
    return config(f'data.eval=["{tmp_path}/held_out.h5"]', "checkpoint.save_total_limit=1",
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


def test_a_loss_that_is_no_number_is_never_the_best(config, tmp_path):
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
    path = config(f'model.name_or_path="{tmp_path}/model"', f'data.train=["{tmp_path}/train.h5"]', "train.max_steps=2",
                  f'data.eval=["{tmp_path}/eval.h5"]', 'eval={"eval_steps": 1, "load_best_model_at_end": true}')
    for steps in (2, 3):
        done = succeed("train", path, f"train.max_steps={steps}")
        assert "no evaluation gave a finite loss" in done.stderr
    assert [line["eval_loss"] for line in metrics(path.parent / "run")] == [None] * 3
