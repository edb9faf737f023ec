"""data/prepare: input forms, shards, the split, errors, the tokenizer pipe and the corpora.

Oracles: h5py reading the shards back, tests/golden/smollm2_gguf.json, samples worked out by hand.
Run: .venv/bin/python -m pytest tests/cli/test_prepare.py
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
from prepare_support import CHAT, GOLDEN, MODEL, PREPARE, load_once, messages, program

import prepare
import records
from errors import run_reporting_errors
from samples import Sample, encode_chats
from shards import split_of

LABELLED = [{"text": f"text {i}", "label": ("cat", "dog", "a bird")[i % 3]} for i in range(30)]


@pytest.fixture
def tokenizer():
    return load_once(MODEL)


# --- input files -------------------------------------------------------------------------------------------------

@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(kind, file contents by name, option...) -> (exit code, standard error); shards go to tmp_path/out."""
    def call(kind, files, *options):
        for name, content in files.items():
            lines = "".join(json.dumps(line) + "\n" for line in content) if isinstance(content, list) else content
            (tmp_path / name).write_bytes(lines if isinstance(lines, bytes) else lines.encode())
        monkeypatch.setattr(sys, "argv", ["prepare", kind, "--model", str(MODEL), "--output", str(tmp_path / "out"),
                                          "--input", *(str(tmp_path / name) for name in files), *options])
        monkeypatch.setattr(prepare, "load_tokenizer", load_once)
        try:
            code = run_reporting_errors("graft prepare", prepare.main)
        except SystemExit as leave:
            code = leave.code
        return code, capsys.readouterr().err
    return call


def read_shards(folder, split):
    """All rows of a split as (tokens, mask), and the attributes and datasets of its last shard."""
    rows, last = [], {}
    for path in sorted(folder.glob(f"{split}-*.h5")):
        with h5py.File(path) as file:
            last = {**file.attrs, **{name: file[name][:] for name in file}}
            assert all(file[name].fletcher32 and file[name].chunks for name in file)
            cuts = file["offsets"][1:-1].astype(int)
            rows += zip(np.split(file["tokens"][:], cuts), np.split(file["loss_mask"][:], cuts))
            assert file.attrs["num_samples"] == len(cuts) + 1
    return rows, last


FORMS = {
    "messages": {"messages": messages(*CHAT)},
    "completion": {"prompt": CHAT[0][1], "completion": CHAT[1][1]},
    "alpaca": {"instruction": CHAT[0][1], "input": "", "output": CHAT[1][1]},
    "sharegpt": {"conversations": [{"from": "human", "value": CHAT[0][1]}, {"from": "gpt", "value": CHAT[1][1]}]},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_conversation_gives_the_same_sample(run, tmp_path, tokenizer, form):
    assert run("chat", {"a.jsonl": [FORMS[form]]}, "--eval-fraction", "0") == (0, "")
    (row,), _ = read_shards(tmp_path / "out", "train")
    (expected,) = encode_chats(tokenizer, ["x"], [messages(*CHAT)])
    assert (row[0].tolist(), row[1].tolist()) == (expected.tokens, expected.mask)


def test_alpaca_input_follows_the_instruction(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "Sum", "input": "1 2", "output": "3", "system": "s"}))
    ((_, chat),) = records.read_chats(tmp_path / "a.jsonl")
    assert chat == messages(("system", "s"), ("user", "Sum\n\n1 2"), ("assistant", "3"))


def test_shard_says_what_it_holds(run, tmp_path, tokenizer):
    assert run("text", {"a.txt": "\ufeffone two", "b.jsonl": [{"text": "three"}]}, "--eval-fraction", "0")[0] == 0
    rows, shard = read_shards(tmp_path / "out", "train")
    assert [row[0].tolist() for row in rows] == [[*tokenizer.encode(text), 2] for text in ("one two", "three")]
    assert [row[1].tolist() for row in rows] == [[0, 1, 1], [0, 1]]
    assert (shard["graft_schema"], shard["kind"], shard["num_samples"]) == (1, b"tokens", 2)
    assert (shard["vocab_size"], shard["tokenizer_sha256"]) == (49152, tokenizer.sha256.encode())
    assert [shard[name].dtype for name in ("tokens", "offsets", "loss_mask")] == [np.uint32, np.uint64, np.uint8]
    assert shard["created_by"] and shard["offsets"].tolist() == [0, 3, 5]


def test_classification_shard_ranks_labels_without_a_tokenizer(run, tmp_path, tokenizer):
    options = ("--prompt", "{text} of {labels}", "--eval-fraction", "0")
    assert run("classification", {"a.jsonl": LABELLED}, *options) == (0, "")
    rows, shard = read_shards(tmp_path / "out", "train")
    assert shard["labels"].tolist() == [b"a bird", b"cat", b"dog"]
    assert shard["label"].tolist() == [(1, 2, 0)[i % 3] for i in range(30)] and shard["label"].dtype == np.int32
    ends = shard["label_offsets"].astype(int)
    assert [shard["label_tokens"][a:b].tolist() for a, b in zip(ends, ends[1:])] == [
        [*tokenizer.encode(label), 2] for label in ("a bird", "cat", "dog")]
    assert "user\ntext 0 of a bird, cat, dog<|im_end|>" in tokenizer.decode(rows[0][0].tolist())
    assert tokenizer.decode(rows[0][0][rows[0][1] == 1].tolist()) == "cat<|im_end|>"


@pytest.mark.parametrize("name, delimiter", [("a.csv", ","), ("a.tsv", "\t")])
def test_table_holds_the_same_as_json_lines(tmp_path, name, delimiter):
    (tmp_path / name).write_text(delimiter.join(["id", "label", "text"]) + f'\n1{delimiter}7{delimiter}"x\ny"\n')
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ny", "label": 7}\n\n')
    assert [pair for _, pair in records.read_labelled(tmp_path / name)] == [("x\ny", "7")]
    assert [pair for _, pair in records.read_labelled(tmp_path / "a.jsonl")] == [("x\ny", "7")]


# --- split, shards, cutting --------------------------------------------------------------------------------------

TEXTS = [{"text": f"document number {i % 300}"} for i in range(600)]  # each twice


def test_eval_is_a_repeatable_share_and_disjoint_from_train(run, tmp_path):
    assert run("text", {"a.jsonl": TEXTS}, "--eval-fraction", "0.2")[0] == 0
    splits = {name: {row[0].tobytes() for row in read_shards(tmp_path / "out", name)[0]} for name in ("train", "eval")}
    assert not splits["train"] & splits["eval"] and len(splits["train"] | splits["eval"]) == 300
    assert 36 <= len(splits["eval"]) <= 84  # 60 expected, 3.5 deviations
    before = (tmp_path / "out/eval-00000.h5").read_bytes()
    assert run("text", {"a.jsonl": TEXTS}, "--eval-fraction", "0.2")[0] == 0
    assert (tmp_path / "out/eval-00000.h5").read_bytes() == before


def test_split_depends_on_the_tokens_alone():
    assert split_of(Sample([5, 6], [0, 1]), 0.5) == split_of(Sample((5, 6), [1, 1], 3), 0.5)
    assert {split_of(Sample([i], [1]), 0.5) for i in range(50)} == {"train", "eval"}
    assert {split_of(Sample([i], [1]), 0.0) for i in range(50)} == {"train"}


def test_shards_are_bounded_and_replace_those_of_an_earlier_run(run, tmp_path):
    assert run("text", {"a.jsonl": TEXTS}, "--shard-tokens", "1000", "--eval-fraction", "0.1")[0] == 0
    sizes = []
    for path in sorted((tmp_path / "out").glob("train-*.h5")):
        with h5py.File(path) as file:
            sizes.append(len(file["tokens"]))
    assert len(sizes) > 2 and 990 <= min(sizes[:-1]) and max(sizes) <= 1000
    rows = len(read_shards(tmp_path / "out", "train")[0]) + len(read_shards(tmp_path / "out", "eval")[0])
    assert rows == 600
    assert run("text", {"a.jsonl": TEXTS}, "--eval-fraction", "0")[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train-00000.h5"]


def test_failed_run_leaves_the_shards_that_were_there(run, tmp_path):
    assert run("text", {"a.jsonl": TEXTS[:10]}, "--eval-fraction", "0")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert run("text", {"a.jsonl": [*TEXTS, {"text": 1}]}, "--shard-tokens", "100")[0] == 3
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_long_samples_are_cut_and_those_without_a_target_dropped(run, tmp_path, capsys):
    chats = [{"prompt": "hi", "completion": "yes " * 50}, {"prompt": "hi " * 50, "completion": "yes"}]
    assert run("chat", {"a.jsonl": chats}, "--max-length", "40", "--eval-fraction", "0")[0] == 0
    (row,), _ = read_shards(tmp_path / "out", "train")
    assert len(row[0]) == 40 and row[1].tolist() == [0] * 31 + [1] * 9
    assert run("classification", {"a.jsonl": LABELLED}, "--max-length", "10")[0] == 3


def test_reading_stops_after_the_first_records(run, tmp_path):
    assert run("text", {"a.jsonl": TEXTS}, "--max-samples-per-file", "7", "--eval-fraction", "0")[0] == 0
    assert len(read_shards(tmp_path / "out", "train")[0]) == 7


# --- errors ------------------------------------------------------------------------------------------------------

GOOD = FORMS["completion"]


@pytest.mark.parametrize("kind, files, where", [
    ("chat", {"a.jsonl": b'{"prompt": "a", "completion": "b"}\n{"prompt"\n'}, "a.jsonl:2: not valid JSON"),
    ("chat", {"a.jsonl": b"[" * 100_000}, "a.jsonl:1: not valid JSON"),
    ("chat", {"a.jsonl": [GOOD, [1]]}, "a.jsonl:2: expected a JSON object, found list"),
    ("chat", {"a.jsonl": [GOOD, FORMS["alpaca"]]}, "a.jsonl:2: form Alpaca, but the file began with prompt/completion"),
    ("chat", {"a.jsonl": [{"question": "a"}]}, "a.jsonl:1: keys ['question'] are no form"),
    ("chat", {"a.jsonl": [GOOD | FORMS["alpaca"]]}, "a.jsonl:1: keys"),
    ("chat", {"a.jsonl": [{"messages": messages(("wizard", "x"))}]}, "a.jsonl:1: messages[1]: unknown role 'wizard'"),
    ("chat", {"a.jsonl": [{"messages": [{"role": "user"}]}]}, "a.jsonl:1: messages[1]: 'content' is missing"),
    ("chat", {"a.jsonl": [{"messages": "hello"}]}, "a.jsonl:1: 'messages' is not a list of objects"),
    ("chat", {"a.jsonl": [{"messages": messages(("user", "x"))}]}, "a.jsonl:1: no assistant turn"),
    ("chat", {"a.jsonl": [{"prompt": "x", "completion": " "}]}, "a.jsonl:1: an assistant turn is empty"),
    ("chat", {"a.jsonl": [{"messages": messages(("assistant", "x"))}]}, "a.jsonl:1: the model's chat template renders"),
    ("chat", {"a.jsonl": b""}, "a.jsonl: holds no records"),
    ("text", {"a.txt": b" \n"}, "a.txt: holds no text"),
    ("text", {"a.txt": b"one\ntw\xff"}, "a.txt:2: not UTF-8: byte 0xff at column 3"),
    ("text", {"a.jsonl": [{"body": "x"}]}, "a.jsonl:1: 'text' is missing, expected text"),
    ("text", {"a.jsonl": [{"text": 5}]}, "a.jsonl:1: 'text' is int, expected text"),
    ("text", {"a.jsonl": [{"text": "\ud800"}]}, "a.jsonl:1: 'text' holds half a surrogate pair"),
    ("classification", {"a.jsonl": [{"text": "x", "label": "y"}]}, "every record has the label 'y'"),
    ("classification", {"a.jsonl": [{"text": "x", "label": True}]}, "a.jsonl:1: 'label' is bool"),
    ("classification", {"a.jsonl": [{"text": "x", "label": " "}]}, "a.jsonl:1: the label is empty"),
    ("classification", {"a.csv": "text,kind\nx,y\n"}, "a.csv:1: the header names no column label"),
    ("classification", {"a.csv": "text,label,text\nx,y,z\n"}, "a.csv:1: the header names the column text twice"),
    ("classification", {"a.csv": "text,label\nx,y,z\n"}, "a.csv:2: another number of fields"),
    ("classification", {"a.csv": 'text,label\n"x'}, "a.csv:2: unexpected end of data"),
    ("classification", {"a.csv": ""}, "a.csv:1: the header names no column label or text"),
    ("classification", {"a.csv": "text,label\n"}, "a.csv: holds no records"),
])
def test_bad_data_is_one_line_that_names_the_place(run, kind, files, where):
    code, error = run(kind, files)
    assert code == 3 and where in error and error.startswith("error: graft prepare: ") and error.count("\n") == 1


def test_huge_line_is_refused_before_it_is_held(run, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1 << 20)
    code, error = run("text", {"a.jsonl": json.dumps({"text": "x" * (1 << 20)})})
    assert code == 3 and "a.jsonl:1: line of more than 1 MiB" in error


@pytest.mark.parametrize("options, message", [
    (("--eval-fraction", "1"), "expected 0 <= F < 1"),
    (("--eval-fraction", "nan"), "expected 0 <= F < 1"),
    (("--max-length", "1"), "--max-length 1: expected at least 2"),
    (("--prompt", "no place"), "expected {text}"),
    (("--input", "/nowhere.txt"), "/nowhere.txt: no such file"),
    (("--model", "/nowhere.gguf"), "/nowhere.gguf: no such model"),
    (("--model", str(PREPARE)), "no tokenizer.json in it"),
    (("--bogus",), "unrecognized arguments"),
])
def test_wrong_usage_exits_with_2(run, options, message):
    code, error = run("text", {"a.txt": "text"}, *options)
    assert code == 2 and message in error


def test_file_of_another_kind_is_wrong_usage(run):
    code, error = run("chat", {"a.csv": "text,label\n"})
    assert code == 2 and "kind chat does not read .csv files" in error


WORDS = [{"tokens": ["Gravitation", "pulls", "Newton's", "apples"], "labels": ["idea", None, "name", 7]} for _ in range(3)]


def test_words_give_their_label_to_their_first_token(run, tmp_path, tokenizer):
    assert run("classification", {"a.jsonl": WORDS}, "--eval-fraction", "0") == (0, "")
    rows, shard = read_shards(tmp_path / "out", "train")
    names = [name.decode() for name in shard["labels"]]
    assert names == ["7", "idea", "name"] and "label" not in shard and "label_tokens" not in shard
    for (tokens, mask), labels in zip(rows, np.split(shard["token_labels"], shard["offsets"][1:-1].astype(int))):
        assert tokenizer.decode([int(t) for t in tokens]) == "Gravitation pulls Newton's apples"
        begins = [tokenizer.decode([int(t) for t in tokens[:i]]) for i, m in enumerate(mask) if m]
        assert [text.strip() for text in begins] == ["", "Gravitation pulls", "Gravitation pulls Newton's"]
        assert [names[label] for label, m in zip(labels, mask) if m] == ["idea", "name", "7"]


def test_plain_classification_holds_the_texts_alone(run, tmp_path, tokenizer):
    assert run("classification", {"a.jsonl": LABELLED}, "--plain", "--eval-fraction", "0", "--max-length", "3") == (0, "")
    rows, shard = read_shards(tmp_path / "out", "train")
    names = [name.decode() for name in shard["labels"]]
    assert "label_tokens" not in shard and not any(mask.any() for _, mask in rows)
    for record, (tokens, _), label in zip(LABELLED, rows, shard["label"]):
        assert list(tokens) == tokenizer.encode_batch([record["text"]])[0].ids[:3] and names[label] == record["label"]


@pytest.mark.parametrize("record, message", [
    ({"tokens": ["a"], "labels": ["x", "y"]}, "two lists of equal length"),
    ({"tokens": [], "labels": []}, "two lists of equal length"),
    ({"tokens": ["a", " "], "labels": ["x", "y"]}, "word 2: the word or its label is empty"),
    ({"tokens": ["a", "b"], "labels": ["x", None]}, "1 labels, expected at least two"),
])
def test_bad_labelled_words_are_told_with_their_place(run, record, message):
    code, error = run("classification", {"a.jsonl": [record]})
    assert code == 3 and message in error


# --- programs ----------------------------------------------------------------------------------------------------

def test_pipe_answers_line_by_line(tokenizer):
    asked = [{"op": "render", "messages": GOLDEN["messages"]}, {"op": "encode", "text": "Hello world"},
             {"op": "decode", "ids": GOLDEN["greedy_new_ids"]}, {"op": "info"}, {"op": "sing"}, {"op": "decode"}, 7,
             {"op": "decode", "ids": [-1]}, {"op": "decode", "ids": "x"}, {"op": "render", "messages": 3},
             {"op": "encode", "text": None}, {"op": "decode", "ids": [2], "skip_special": True}]
    done = program("tokenizer_pipe.py", "--model", MODEL, text="\n".join(["{", *map(json.dumps, asked)]))
    broken, render, encode, decode, info, *rest = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0 and done.stderr == ""
    assert render == {"ids": GOLDEN["prompt_ids"], "text": GOLDEN["prompt"]}
    assert encode == {"ids": [19556, 905]} and decode == {"text": GOLDEN["greedy_text"]}
    assert info == {"eos_ids": [2], "vocab_size": 49152, "sha256": tokenizer.sha256, "has_chat_template": True}
    assert all(set(reply) == {"error", "exit_code"} for reply in (broken, *rest[:-1])) and len(rest) == 8
    assert rest[-1] == {"text": ""}


def test_pipe_starts_in_time_and_says_why_it_cannot(tmp_path):
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        assert program("tokenizer_pipe.py", "--model", MODEL, text='{"op": "info"}\n').returncode == 0
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 5
    done = program("tokenizer_pipe.py", "--model", tmp_path / "none.gguf", text='{"op": "info"}\n')
    reply = json.loads(done.stdout)
    assert reply["exit_code"] == 2 and "no such model" in reply["error"] and done.stderr == ""


def corpus(name, folder):
    done = program("corpora.py", name, "--output", folder / "c.jsonl")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "c.jsonl").read_text("utf-8").splitlines()]


def test_python_docs_become_shards(tmp_path):
    chats = {chat["messages"][0]["content"]: chat["messages"][1]["content"] for chat in corpus("python-docs", tmp_path)}
    question = next(q for q in chats if "\n\njson.dumps(obj, *, skipkeys=False" in q)
    assert chats[question] == json.dumps.__doc__.splitlines()[0] and len(chats) > 3000
    done = program("prepare.py", "chat", "--input", tmp_path / "c.jsonl", "--model", MODEL,
                   "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    train, held_out = (read_shards(tmp_path / "out", split)[0] for split in ("train", "eval"))
    assert len(train) + len(held_out) == len(chats) and 0.03 < len(held_out) / len(chats) < 0.07


@pytest.mark.parametrize("name", ["character-categories", "package-sections"])
def test_labelled_corpora_are_eight_balanced_classes(tmp_path, name):
    if name == "package-sections" and not list(Path("/var/lib/apt/lists").glob("*_Packages*")):
        pytest.skip("this machine has no Debian package lists")
    rows = corpus(name, tmp_path)
    counts = Counter(row["label"] for row in rows)
    assert len(counts) == 8 and len(set(counts.values())) == 1 and len({row["text"] for row in rows}) == len(rows)
    assert rows == corpus(name, tmp_path)
