"""The console as a user meets it: help, usage errors, what a run and an evaluation show, completion, env."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import termios

import numpy as np
import pytest
import torch
from graft_cli import GRAFT, MODEL, graft, succeed, write_config, write_rows
from safetensors.numpy import load_file, save_file


@pytest.fixture
def config(tmp_path):
    write_rows(tmp_path / "rows.h5", [9, 24, 5, 17])
    return lambda *overrides: write_config(tmp_path / "run.yaml", tmp_path / "rows.h5", "train.max_steps=2", *overrides)


def output(*arguments, code=0):
    """Standard output, or what is said on standard error where the program must fail."""
    done = graft(*arguments)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


# --- usage ------------------------------------------------------------------------------------------------------------


def test_a_misspelt_verb_or_option_is_answered_with_the_nearest():
    assert output("trian", "x.yaml", code=2).startswith("error: unknown verb 'trian'; did you mean 'train'?\n")
    assert output(code=2).startswith("error: a verb is missing; known: train, ")
    assert "error: merge: unknown option '--adaptor'; did you mean '--adapter'?" in output("merge", "--adaptor", "x", code=2)
    assert output("train", code=2).startswith("error: train: CONFIG is required")


def test_a_number_out_of_range_is_told_with_the_range():
    said = output("merge", "--model", "m", "--adapter", "a", "--output", "o", "--max-file-bytes", 0, code=2)
    assert said.startswith(f"error: merge: --max-file-bytes: Value 0 not in range 1 to {1 << 50}\n")


@pytest.mark.parametrize("arguments", [("trian",), ("train",), ("train", "--bogus")])
def test_a_usage_error_is_told_once_per_job(arguments):
    done = graft(*arguments, ranks=2)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1


def test_help_and_version_are_told_once_per_job():
    assert output("--version") == succeed("--version", ranks=2).stdout
    assert succeed("train", "--help", ranks=2).stdout.count("Usage: ") == 1


@pytest.mark.parametrize("arguments", [("methods",), ("env",), ("methods", "lora", "--json")])
def test_output_that_cannot_be_written_is_an_error(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run([GRAFT, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 3 and "standard output cannot be written" in done.stderr


# --- what a run shows -------------------------------------------------------------------------------------------------


def on_terminal(columns, *arguments):
    """What a terminal of that width shows: for each line, the texts that were drawn over one another."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen([GRAFT, *map(str, arguments)], stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                said += os.read(ours, 4096)
            except OSError:  # the program has left
                break
    os.close(ours)
    assert process.returncode == 0, said
    return [line.split("\r\033[K") for line in said.decode().split("\r\n")]


@pytest.mark.parametrize("columns", [48, 120])
def test_a_terminal_keeps_the_last_line_of_training_within_its_width(config, columns):
    lines = on_terminal(columns, "train", config())
    drawn = [text for line in lines for text in line if text.startswith(("loading", "training"))]
    assert drawn and all(len(text) < columns for text in drawn)
    left = [line[-1] for line in lines]
    assert any(re.match(r"training .*100%  step 2/2  loss \d", text) for text in left)
    assert not any(text.startswith("loading") for text in left)
    if columns == 120:
        assert any(re.search(r"\[=+\] 100%.* tok/s  in \d+ s$", text) for text in left)


def test_the_banner_counts_in_words(config):
    said = succeed("train", config("parallel.lanes_per_gather=1", "data.max_length=20")).stderr
    assert "data     4 documents, 1 longer than data.max_length (cut)" in said
    assert "step     4 x 1 x 20 tokens (each gather serves 1 lane of a rank's 4), 2 steps from 0" in said
    assert "ranks    1 on 1 node, 1 CPU thread each, float32" in said and "loading" not in said


# --- eval -------------------------------------------------------------------------------------------------------------


def test_eval_writes_to_output_and_leaves_the_record_of_the_run(config, tmp_path):
    record = json.loads(output("eval", config(), "--base", "--json", "--output", tmp_path / "new/base.json"))
    assert json.loads((tmp_path / "new/base.json").read_text()) == record and not (tmp_path / "run").exists()


def test_eval_looks_at_the_data_before_it_loads_the_base(config, tmp_path):
    (tmp_path / "model").mkdir()
    shutil.copy(MODEL / "config.json", tmp_path / "model")  # no weights: loading would fail
    path = config(f'model.name_or_path="{tmp_path}/model"')
    assert "data.eval names no shards" in output("eval", path, "data.eval=[]", code=2)
    (tmp_path / "rows.h5").write_bytes(b"no shard")
    assert "rows.h5" in output("eval", path, code=3)


def test_a_loss_that_is_not_finite_ends_with_7(config, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    factors = {"model.embed_tokens.weight": 1e12, "model.norm.weight": 1e30}  # finite weights, whose products are not
    for file in (tmp_path / "model").glob("*.safetensors"):
        save_file({name: value * np.float32(factors.get(name, 1)) for name, value in load_file(file).items()}, file)
    path = config(f'model.name_or_path="{tmp_path}/model"', 'model.quantization="none"')
    assert "error: the held-out loss of the untouched base is" in output("eval", path, "--base", code=7)
    assert not (tmp_path / "run").exists()


# --- completion, env --------------------------------------------------------------------------------------------------


def bash_completions(*words):
    line = "COMP_WORDS=(graft " + " ".join(f"'{w}'" for w in words) + f"); COMP_CWORD={len(words)}; _graft; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", output("completion", "bash") + line], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_verbs_options_and_values():
    verbs = re.findall(r"^  (\w+) ", output("--help").split("Subcommands:")[1], re.M)
    assert set(verbs) >= {"train", "merge", "env"} and set(verbs) <= set(bash_completions(""))
    assert bash_completions("mer") == ["merge"]
    assert set(bash_completions("merge", "--")) >= {"--model", "--adapter", "--output", "--dtype", "--help"}
    assert bash_completions("merge", "--dtype", "") == ["auto", "float32", "bfloat16"]
    assert bash_completions("completion", "f") == ["fish"]
    assert bash_completions("merge", "--model", "") == []  # bash then offers files
    assert bash_completions("train", "--resume", "") == ["auto", "never"]
    assert "lora" in bash_completions("methods", "") and "llama3_8b" in bash_completions("models", "")


def test_bash_completes_what_prepare_takes():
    known = output("prepare", "--help").split("input files:")[0]
    options = set(re.findall(r"--[a-z-]+", known))
    kinds = set(re.search(r"\{([a-z,]+)\}", known)[1].split(","))
    assert set(bash_completions("prepare", "")) == options | kinds


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_every_verb_and_option(shell):
    script = output("completion", shell)
    for verb in ("train", "inspect", "export"):
        for option in re.findall(r"--([a-z][a-z-]+)", output(verb, "--help").split("Examples:")[0]):
            assert re.search(rf"{verb}\b.*\n?(.*\n)*?.*(--| -l ){option}\b", script), (verb, option)
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_completion_of_an_unknown_shell_is_a_usage_error():
    assert "tcsh" in output("completion", "tcsh", code=2)


def test_env_is_key_value_lines():
    lines = output("env").splitlines()
    values = dict(line.split(": ", 1) for line in lines)
    assert values["LibTorch"].startswith(torch.__version__.split("+")[0]) and values["GRAFT_RANK"] == "not set"
    assert {"graft", "MPI", "HDF5", "yaml-cpp", "CUDA", "host", "cores", "memory"} <= values.keys()
    assert re.match(r"\d+\.\d+\.\d+", values["HDF5"]) and re.match(r"\d+\.\d+", values["yaml-cpp"])
