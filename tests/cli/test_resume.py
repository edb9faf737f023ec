"""graft train after a kill, a signal or damage: goes on where it was, to the same bits, or says why it cannot.

The oracle is the uninterrupted run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal

import pytest
from graft_cli import (GRAFT, Job, adapter, checkpoints, graft, metrics, succeed, write_config, write_rows)

STEPS = 30
MANY = 200  # more steps than the kills of a test leave time for
PREEMPTED, USAGE, NO_CHECKPOINT = 75, 2, 6


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


def first_call_of_a_save(trace):
    """The number of the first traced call that touches the new checkpoint, and how many follow until it stands."""
    lines = trace.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if ".tmp-step-" in line)
    end = max(i for i, line in enumerate(lines) if "checkpoints/" in line)
    return start + 1, end + 1


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_kill_at_every_write_of_a_save_leaves_a_loadable_checkpoint(config, tmp_path):
    """Each attempt goes on from what the one before left, and is killed one system call later in its first save."""
    calls = "mkdir,write,fsync,rename,unlinkat,rmdir"
    small = 'peft=[{"method": "lora", "r": 2, "target_modules": ["layers.0.self_attn.q_proj"]}]'
    steps = ["checkpoint.save_steps=1", "checkpoint.save_total_limit=1", 'train.lr_scheduler_type="constant"',
             "train.warmup_ratio=0.0", small]
    path = config(*steps, "train.max_steps=2")
    run = path.parent / "run"
    succeed("train", path)
    traced = ["strace", "-f", "-qq", "-o", str(tmp_path / "trace.txt"), "-e", f"trace={calls}"]

    def attempt(max_steps, *injection):
        with Job(wrapped=[*traced, *injection, str(GRAFT), "train", str(path), f"train.max_steps={max_steps}"]) as job:
            return job.wait()
    done = attempt(3)
    if "ptrace" in done.stderr or "PTRACE" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    first, last = first_call_of_a_save(tmp_path / "trace.txt")
    assert last - first > 20
    newest = [checkpoints(run)[-1].name]
    for number in range(first, last + 1):
        done = attempt(MANY, "-e", f"inject={calls}:signal=KILL:when={number}")
        assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), (number, done.stderr)
        newest.append(checkpoints(run)[-1].name)
    assert newest[0] == newest[1] < newest[-1]  # the first kill came before the new one stood, the last after
    succeed("train", path, f"train.max_steps={MANY}")
    uninterrupted = config(*steps, f"train.max_steps={MANY}", "checkpoint.save_steps=0", folder="uninterrupted")
    succeed("train", uninterrupted)
    assert adapter(run) == adapter(uninterrupted.parent / "run")


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


def test_a_run_goes_on_with_other_rank_counts_to_the_same_bits(config, reference):
    path = config()
    run = path.parent / "run"
    for ranks, step in ((2, 7), (4, 17)):
        done_before = max((line["step"] for line in metrics(run)), default=0)
        with Job("train", path, lanes(ranks), ranks=ranks) as job:
            assert job.wait_for_step(run, max(step, done_before + 1))  # a step of this job, not of the one before
            job.kill_ranks(signal.SIGUSR1)
            done = job.wait()
        assert done.returncode == PREEMPTED, done.stderr
        assert step <= metrics(run)[-1]["step"] < STEPS
    succeed("train", path)
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


def test_lanes_that_differ_are_refused(finished):
    assert "set the accumulation to 4" in refused(finished, "train.gradient_accumulation_steps=2")


def test_resume_never_refuses_a_folder_with_a_run(finished):
    assert "holds a run already" in refused(finished, "--resume", "never")


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


def test_the_best_adapter_is_kept_and_wins(config, tmp_path):
    """At this rate the loss on rows never seen rises sooner or later: the last step is not the best one."""
    write_rows(tmp_path / "held_out.h5", [20, 20], seed=1)
    path = config(f'data.eval=["{tmp_path}/held_out.h5"]', "checkpoint.save_total_limit=1",
                  'eval={"eval_steps": 1, "load_best_model_at_end": true}')
    succeed("train", path)
    run = path.parent / "run"
    evaluations = {line["step"]: line["eval_loss"] for line in metrics(run)}
    best = min(evaluations, key=evaluations.get)
    assert best < STEPS
    kept = run / f"checkpoints/step-{best:08d}"
    assert adapter(run) == (kept / "adapter_model.safetensors").read_bytes()
    assert json.loads((kept / "trainer.json").read_text())["best_step"] == best
