"""A rank that is stopped or killed never leaves a job hanging: it is named, with its host, and the job ends with 5."""

from __future__ import annotations

import os
import platform
import signal
import time
from pathlib import Path

import pytest
from graft_cli import GRAFT, ROOT, Job, metrics, write_config, write_rows

COMMUNICATION = 5
TIMEOUT_S = 5
ASKING_S = 4  # what a verdict takes after the deadline
ENDING_S = 4  # mpirun clears the job up


@pytest.fixture
def config(tmp_path):
    """config(override...) -> the path of a run's file."""
    write_rows(tmp_path / "rows.h5", [20, 20, 20, 20])
    return lambda *overrides: write_config(tmp_path / "run.yaml", tmp_path / "rows.h5",
                                           f"parallel.timeout_s={TIMEOUT_S}", *overrides)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("stopped, ranks", [(1, 2), (0, 3)])
def test_a_stopped_rank_is_named_and_the_job_ends_with_5(config, stopped, ranks):
    path = config("train.max_steps=100000")
    with Job("train", path, ranks=ranks) as job:
        assert job.wait_for_step(path.parent / "run", 3)
        pids = job.rank_pids()
        start = time.monotonic()
        os.kill(pids[stopped], signal.SIGSTOP)
        done = job.wait()
    seconds = time.monotonic() - start
    assert done.returncode == COMMUNICATION, done.stderr
    assert TIMEOUT_S <= seconds <= TIMEOUT_S + ASKING_S + ENDING_S
    named = f"rank {stopped} (host {platform.node()}) did not come to "
    assert done.stderr.count("error: ") == done.stderr.count(named) == 1, done.stderr
    assert "it is stopped or dead" in done.stderr
    end = time.monotonic() + ENDING_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):  # the stopped one too
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_pause_shorter_than_the_deadline_does_no_harm(config):
    path = config("train.max_steps=100")
    with Job("train", path, ranks=2) as job:
        assert job.wait_for_step(path.parent / "run", 3)
        pid = job.rank_pids()[1]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(TIMEOUT_S / 2)
        assert job.process.poll() is None  # the pause came in the midst of the run
        os.kill(pid, signal.SIGCONT)
        assert job.wait().returncode == 0
    assert [line["step"] for line in metrics(path.parent / "run")] == list(range(1, 101))


def test_a_killed_rank_is_named_and_the_job_ends_with_5(config):
    path = config("train.max_steps=100000")
    command = [str(ROOT / "cluster/mpirun.sh"), "-np", "2", str(GRAFT), "train", str(path)]
    with Job(wrapped=command) as job:
        assert job.wait_for_step(path.parent / "run", 3)
        (mpirun,) = children(job.process.pid)
        os.kill(children(mpirun)[1], signal.SIGKILL)
        done = job.wait()
    assert done.returncode == COMMUNICATION, done.stderr
    assert f"on node {platform.node()} exited on signal 9" in done.stderr
    assert done.stderr.count("process rank 1 ") == 1
    assert done.stderr.count("error: ") == 1
