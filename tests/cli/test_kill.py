"""graft train killed at random steps and at every write: goes on to the same bits.

The oracle is the uninterrupted run.
"""

from __future__ import annotations

import os
import random
import shutil
import signal

import pytest
from graft_cli import GRAFT, STEPS, Job, adapter, assert_same_run, checkpoints, files_of, graft, lanes, succeed

MANY = 200  # more steps than the kills of a test leave time for
USAGE = 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_at_random_steps_then_resume_gives_the_same_bits(long_run, reference, ranks):
    path = long_run(lanes(ranks))
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


def test_one_dead_rank_ends_the_job(long_run):
    path = long_run(lanes(4), "train.max_steps=100000")
    with Job("train", path, ranks=4) as job:
        assert job.wait_for_step(path.parent / "run", 3)
        os.kill(job.rank_pids()[2], signal.SIGKILL)
        assert job.wait(30).returncode != 0


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
def test_kill_at_every_write_of_a_save_leaves_a_loadable_checkpoint(long_run, tmp_path):
    """Each attempt goes on from what the one before left, and is killed one system call later in its first save."""
    small = 'peft=[{"method": "lora", "r": 2, "target_modules": ["layers.0.self_attn.q_proj"]}]'
    steps = ["checkpoint.save_steps=1", "checkpoint.save_total_limit=1", 'train.lr_scheduler_type="constant"',
             "train.warmup_ratio=0.0", small]
    path = long_run(*steps, "train.max_steps=2")
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
    uninterrupted = long_run(*steps, f"train.max_steps={MANY}", "checkpoint.save_steps=0", folder="uninterrupted")
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
