"""graft validate: every mistake of a run file and of the files it names, in one pass, each where it is written."""

from __future__ import annotations

import shutil

import pytest
from graft_cli import MODEL, ORACLE, ROOT, graft, succeed, write_rows

USAGE = 2
RECIPES = sorted((ROOT / "configs/runs").glob("*.yaml"))

YAML = """schema: 1
model:
  name_or_path: {model}
  adapters: [{folder}/none, {adapter}]
data:
  train:
    - {folder}/rows.h5
    - {folder}/missing-*.h5
    - {folder}/torn.h5
  eval: {folder}/eval.h5
  max_length: 0
peft:
  - method: lora
    target_modules: [nothing]
  - init_from: {folder}
  - method: lora
train: {{max_steps: 2}}
"""


@pytest.fixture
def config(tmp_path):
    """config(model) -> the path of such a file, with the files that it names beside it."""
    write_rows(tmp_path / "rows.h5", [9, 24])
    write_rows(tmp_path / "eval.h5", [9, 24], vocab_size=129)
    (tmp_path / "torn.h5").write_text("no shard")
    path = tmp_path / "run.yaml"

    def call(model=MODEL):
        path.write_text(YAML.format(model=model, folder=tmp_path, adapter=ORACLE / "llama_tied/adapter"))
        return path
    return call


def mistakes(path, *arguments):
    """{"line:column key" or "command line key": message} of all that is said, in that order."""
    done = graft("validate", path, *arguments)
    assert done.returncode == USAGE and done.stdout == "", done.stderr
    lines = [line.removeprefix(f"{path}:").split(": ", 2) for line in done.stderr.removeprefix("error: ").splitlines()]
    return {f"{place} {key}": message for place, key, message in lines}


def test_all_files_that_are_wrong_are_told_in_one_pass_with_place_and_key(config, tmp_path):
    found = mistakes(config())
    assert list(found) == ["4:14 model.adapters.0", "8:7 data.train.1", "9:7 data.train.2", "10:9 data.eval",
                           "11:15 data.max_length", "13:5 peft.0", "15:16 peft.1.init_from"]
    none, missing, torn, larger, _, target, start = found.values()
    assert f"{tmp_path}/none: no adapter_config.json" in none and f"{tmp_path}: no adapter_config.json" in start
    assert missing.startswith(f"{tmp_path}/missing-*.h5: no such shard") and torn.startswith(f"{tmp_path}/torn.h5: ")
    assert "vocabulary of 129, the model has 128" in larger
    assert target.startswith("target_modules 'nothing' matches nothing")


def test_without_a_model_the_other_files_are_checked_all_the_same(config, tmp_path):
    found = mistakes(config(tmp_path / "gone"))
    assert list(found) == ["3:17 model.name_or_path", "4:14 model.adapters.0", "8:7 data.train.1", "9:7 data.train.2",
                           "11:15 data.max_length", "15:16 peft.1.init_from"]
    assert found["3:17 model.name_or_path"].startswith(f"{tmp_path}/gone does not exist")


def test_a_model_folder_without_its_weights_is_told(config, tmp_path):
    (tmp_path / "model").mkdir()
    shutil.copy(MODEL / "config.json", tmp_path / "model")
    right = [f'data.train=["{tmp_path}/rows.h5"]', "data.eval=[]", "data.max_length=24", "model.adapters=[]",
             "peft=[{method: lora}]"]
    path = config(tmp_path / "model")
    assert "no .safetensors files" in mistakes(path, *right)["3:17 model.name_or_path"]
    succeed("validate", path, *right, "model.weights=random")


def test_shards_of_two_tokenizers_are_told_at_their_list(config, tmp_path):
    write_rows(tmp_path / "other.h5", [9], tokenizer_sha256="1" * 64)
    found = mistakes(config(), f"data.train=[{tmp_path}/rows.h5, {tmp_path}/other.h5]")
    assert found["command line data.train"].startswith(f"{tmp_path}/other.h5: made with another tokenizer")


def test_a_wrong_override_has_its_key(config):
    found = mistakes(config(), "data.eval=[/tmp/no/such.h5]")
    assert found["command line data.eval.0"].startswith("/tmp/no/such.h5: no such shard")


def test_an_adapter_to_start_from_must_fit_its_method(config):
    directory = ORACLE / "llama_tied/adapter"
    found = mistakes(config(), f"peft=[{{method: lora, r: 3, target_modules: all-linear, init_from: {directory}}}]")
    assert "q_proj.lora_A.weight is [4, 48], expected [3, 48]" in found["command line peft.0"]


def test_a_dry_run_tells_the_same(config):
    path = config()
    done = graft("train", path, "--dry-run")
    assert done.returncode == USAGE and done.stderr == graft("validate", path).stderr


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(recipe):
    succeed("validate", recipe, "--schema-only")
