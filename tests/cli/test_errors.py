"""What the program says, and with which exit code, when the input is wrong, the numbers break or the disk is full.

The contract: each mistake once per job, on standard error, with the value and the place; what was there before stays.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess

import h5py
import numpy as np
import pytest
from graft_cli import (AS_ROOT, GRAFT, MODEL, MPIRUN, VOCABULARY, Job, adapter, checkpoints, graft, metrics, succeed,
                       write_config, write_rows)
from safetensors.numpy import load_file, save_file

USAGE, DATA, NUMERICS = 2, 3, 7


@pytest.fixture
def config(tmp_path):
    write_rows(tmp_path / "rows.h5", [9, 24, 5, 17])
    return lambda *overrides: write_config(tmp_path / "run.yaml", tmp_path / "rows.h5", *overrides)


def fails(code, *arguments, ranks=1):
    """The one error of a job that must end with `code` and leave no adapter."""
    done = graft("train", *arguments, ranks=ranks)
    assert done.returncode == code, (done.returncode, done.stderr)
    assert done.stderr.count("error: ") == 1 and done.stdout == ""
    assert "frame #" not in done.stderr
    return done.stderr


# --- the configuration -------------------------------------------------------------------------------------------

YAML = """schema: 1
model: {name_or_path: MODEL}
data: {train: [ROWS], max_length: 24}
peft: [{method: lora}]
train:
  max_steps: 2
"""


@pytest.mark.parametrize("before, after, place, said", [
    ("max_steps: 2", "max_step: 2", "6:3", "did you mean 'max_steps'?"),
    ("max_steps: 2", "max_steps: 2\n  max_steps: 3", "7:3", "max_steps"),
    ("max_steps: 2", "max_steps: many", "6:14", "expected an integer"),
    ("max_steps: 2", "max_steps: 0", "6:14", "at least 1"),
    ("max_steps: 2", "max_steps: &n 2\n  seed: *n", "6:14", "anchor"),
    ("max_steps: 2", "max_steps: 2\n  num_train_epochs: 1", "7:", "set one of them to null"),
    ("schema: 1", "schema: 2", "1:9", "schema"),
    ("method: lora", "method: lorra", "4:17", "did you mean 'lora'?"),
    ("method: lora", "method: lora, r: 0", "4:", "r"),
    ("train:\n", "trian:\n", "5:1", "did you mean 'train'?"),
])
def test_a_mistake_in_the_file_is_shown_where_it_is(tmp_path, before, after, place, said):
    path = tmp_path / "run.yaml"
    path.write_text(YAML.replace(before, after))
    error = fails(USAGE, path)
    assert f"{path}:{place}" in error and said in error


def test_all_mistakes_are_told_in_one_pass(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML.replace("max_steps: 2", "max_step: 2\n  seed: -1").replace("max_length: 24", "max_length: x"))
    error = fails(USAGE, path)
    assert all(word in error for word in ("max_step", "seed", "max_length"))


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("override, code, said", [
    ("train.learning_rat=1", USAGE, "did you mean 'learning_rate'?"),
    ("model.name_or_path=/tmp/no/such/model", USAGE, "model.name_or_path: /tmp/no/such/model does not exist"),
    ("data.train=[/tmp/no/such-*.h5]", DATA, "/tmp/no/such-*.h5: no such shard"),
    ("peft.0.target_modules=[nothing]", USAGE, "target_modules 'nothing' matches nothing"),
])
def test_a_wrong_override_is_told_once_on_any_number_of_ranks(config, override, code, said, ranks):
    assert said in fails(code, config(), override, ranks=ranks)


def test_a_missing_file_is_named(tmp_path):
    assert str(tmp_path / "no.yaml") in fails(USAGE, tmp_path / "no.yaml")


def test_a_model_folder_without_weights_is_named(config, tmp_path):
    (tmp_path / "model").mkdir()
    shutil.copy(MODEL / "config.json", tmp_path / "model")
    assert f"{tmp_path}/model" in fails(DATA, config(), f"model.name_or_path={tmp_path}/model")


# --- the data ----------------------------------------------------------------------------------------------------

def checked_rows(path):
    """Rows with a checksum on every chunk and on the metadata, as Graft writes them. Returns where the tokens lie."""
    documents, masks = write_rows(path.with_suffix(".plain"), [20] * 8)
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.attrs.update(graft_schema=1, kind="tokens", num_samples=8, created_by="test", tokenizer_sha256="0" * 64,
                          vocab_size=VOCABULARY)
        file.create_dataset("tokens", data=np.concatenate(documents), chunks=(160,), fletcher32=True)
        file.create_dataset("offsets", data=np.arange(9, dtype=np.uint64) * 20, chunks=(9,), fletcher32=True)
        file.create_dataset("loss_mask", data=np.concatenate(masks), chunks=(160,), fletcher32=True)
        return file["tokens"].id.get_chunk_info(0).byte_offset


def test_a_flipped_byte_in_a_shard_ends_the_run(config, tmp_path):
    path = tmp_path / "checked.h5"
    where = checked_rows(path)
    succeed("train", config(f'data.train=["{path}"]'))
    content = bytearray(path.read_bytes())
    content[where + 100] ^= 1
    path.write_bytes(content)
    before = adapter(tmp_path / "run")
    done = graft("train", config(f'data.train=["{path}"]', f'checkpoint.output_dir="{tmp_path}/other"'), ranks=2)
    assert done.returncode == DATA, done.stderr
    assert str(path) in done.stderr and done.stderr.count("error: ") == 1
    assert adapter(tmp_path / "run") == before


def test_a_missing_eval_shard_is_told_before_the_first_step(config, tmp_path):
    path = config("eval.eval_steps=1")
    assert "/tmp/no/such-*.h5: no such shard" in fails(DATA, path, "data.eval=[/tmp/no/such-*.h5]")
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("not HDF5"),
                                   lambda path: os.truncate(path, path.stat().st_size // 2)])
def test_a_file_that_is_no_shard_is_named(config, tmp_path, spoil):
    path = config()
    spoil(tmp_path / "rows.h5")
    assert f"{tmp_path}/rows.h5" in fails(DATA, path)


def test_tokens_the_model_does_not_have_are_refused(config, tmp_path):
    path = config()
    write_rows(tmp_path / "rows.h5", [9, 9], vocab_size=VOCABULARY + 1)
    assert f"vocabulary of {VOCABULARY + 1}, the model has {VOCABULARY}" in fails(DATA, path)


def test_ranks_that_see_different_files_are_told_which(tmp_path):
    words = []
    for rank in (0, 1):
        folder = tmp_path / f"node{rank}"
        folder.mkdir()
        write_rows(folder / "rows.h5", [9, 8, 7], seed=rank)
        write_config(folder / "run.yaml", "rows.h5", "data.eval=[]", f'checkpoint.output_dir="{tmp_path}/run"')
        words += [":"] * rank + ["-np", "1", "-wdir", str(folder), str(GRAFT), "train", "run.yaml"]
    done = subprocess.run([*MPIRUN[:-1], *words], capture_output=True, text=True, env=os.environ | AS_ROOT)
    assert done.returncode == DATA and "data.train: rank 1 sees another than rank 0" in done.stderr
    assert not (tmp_path / "run").exists()


# --- the numbers -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_diverges_ends_with_7_and_names_step_and_tensor(config, ranks):
    path = config("train.max_steps=20", "train.max_grad_norm=0", "train.learning_rate=1e30",
                  f"train.gradient_accumulation_steps={4 // ranks}", "checkpoint.save_steps=1")
    error = fails(NUMERICS, path, ranks=ranks)
    assert "3 steps in a row" in error and "the first value that is not: the output of block.0;" in error
    steps = [line["step"] for line in metrics(path.parent / "run")]
    assert f"error: step {steps[-1] + 1}: " in error
    assert not (path.parent / "run/adapter").exists() and checkpoints(path.parent / "run")


def test_a_weight_that_is_not_a_number_ends_the_run_with_7(config, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    for shard in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(shard)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][3] = np.nan
            save_file(tensors, shard, {"format": "pt"})
    error = fails(NUMERICS, config(f'model.name_or_path="{tmp_path}/model"'))
    assert "step 3: the loss is not finite; the first value that is not: the weight final_norm.weight;" in error


# --- the folder --------------------------------------------------------------------------------------------------

def test_a_folder_that_another_job_uses_is_refused(config, tmp_path):
    path = config("train.max_steps=100000")
    with Job("train", path) as first:
        assert first.wait_for_step(tmp_path / "run", 2)
        assert "is in use by another running job" in fails(USAGE, path)
        reached = metrics(tmp_path / "run")[-1]["step"]
        assert first.wait_for_step(tmp_path / "run", reached + 5)


def test_a_folder_that_cannot_be_made_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file/run" in fails(USAGE, config(), f"checkpoint.output_dir={tmp_path}/file/run")


BAD_STARTS = ["model.name_or_path=/tmp/no/such/model", "data.train=[TMP/large.h5]", "data.train=[/tmp/no/such.h5]",
              "data.max_length=0", "peft.0.target_modules=[nothing]", "model.adapters=[/tmp]",
              "model.name_or_path=TMP/model"]


@pytest.mark.parametrize("override, ranks", [*((start, 1) for start in BAD_STARTS), *((start, 2) for start in BAD_STARTS[:2])])
def test_a_start_that_fails_leaves_nothing(config, tmp_path, override, ranks):
    """Also where it fails late: tokens that the model has not, a model without its weights."""
    write_rows(tmp_path / "large.h5", [9, 9], vocab_size=VOCABULARY + 1)
    (tmp_path / "model").mkdir()
    shutil.copy(MODEL / "config.json", tmp_path / "model")
    path = config(f'checkpoint.output_dir="{tmp_path}/runs/of/mine"')
    before = sorted(tmp_path.rglob("*"))
    done = graft("train", path, override.replace("TMP", str(tmp_path)), ranks=ranks)
    assert done.returncode in (USAGE, DATA), done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("override", ["model.name_or_path=/tmp/no/such/model", "train.learning_rate=1.0"])
def test_a_start_that_fails_takes_nothing_from_what_was_there(config, tmp_path, override):
    def files():
        return {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    path = config("checkpoint.save_steps=2")
    fails(DATA, path, "data.train=[/tmp/no/such.h5]")
    assert [file.name for file in files()] == ["notes.txt"]
    succeed("train", path)
    before = files()
    fails(USAGE, path, override)
    assert files() == before and {"LOCK", "rank-0.log", "config.yaml", "notes.txt"} <= {file.name for file in before}


@pytest.mark.parametrize("name, code", [("logs", DATA), ("checkpoints", USAGE)])
def test_a_file_in_the_place_of_a_folder_is_named(config, tmp_path, name, code):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("")
    assert f"{tmp_path}/run" in fails(code, config())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB, and a way to make it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"may not mount a small file system: {mounted.stderr.strip()}")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=16m", folder], check=True)
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_the_run_and_spoils_nothing(config, small_disk, tmp_path):
    disk, enlarge = small_disk
    steps = ["train.max_steps=20", "checkpoint.save_steps=2", "checkpoint.save_total_limit=null"]
    path = config(*steps, f'checkpoint.output_dir="{disk}/run"')
    error = fails(DATA, path)
    assert "No space left on device" in error and f"{disk}/run" in error
    saved = checkpoints(disk / "run")
    assert 1 <= len(saved) < 10 and not list((disk / "run").rglob(".tmp-*"))
    before = metrics(disk / "run")
    assert "No space left on device" in fails(DATA, path)  # again, from the newest checkpoint
    assert metrics(disk / "run")[:2 * len(saved)] == before[:2 * len(saved)]
    enlarge()
    assert f"resumed from {saved[-1]}" in succeed("train", path).stderr
    assert [line["step"] for line in metrics(disk / "run")] == list(range(1, 21))
    plain = config(*steps)
    succeed("train", plain)
    assert adapter(disk / "run") == adapter(tmp_path / "run")


def test_a_config_written_by_a_run_is_read_again(config, tmp_path):
    succeed("train", config())
    again = succeed("train", tmp_path / "run/config.yaml", f"checkpoint.output_dir={tmp_path}/again")
    assert again.stderr.count("error") == 0
    assert adapter(tmp_path / "again") == adapter(tmp_path / "run")
    record = json.loads((tmp_path / "again/run.json").read_text())
    assert record["world"] == 1 and record["base_fingerprint"]
    assert record["command"][1:] == ["train", f"{tmp_path}/run/config.yaml", f"checkpoint.output_dir={tmp_path}/again"]
    assert record["hosts"] == [socket.gethostname()] and isinstance(record["gpus"], list)
