"""data/prepare: the tokenizer from GGUF and Hugging Face files, and which tokens of a conversation are targets.

Oracles: tests/golden/smollm2_gguf.json (transformers' ids, and those of the file's own pre-tokeniser), masks and word
cuts worked out by hand. Run: .venv/bin/python -m pytest tests/cli/test_prepare_tokenizer.py
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import time
from dataclasses import replace

import pytest
import tokenizers
from prepare_support import CHAT, GOLDEN, MODEL, load_once, messages

import chat_template
from errors import DATA, PrepareError
from gguf_metadata import read_metadata
from samples import encode_chats, encode_documents
from tokenizer import load_tokenizer


@pytest.fixture
def tokenizer():
    return load_once(MODEL)


# --- tokenizer ---------------------------------------------------------------------------------------------------

def gguf_value(value):
    """(value type, bytes) of one metadata value, as the GGUF specification writes it."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, struct.pack("<Q", len(value.encode())) + value.encode()
    kind = gguf_value(value[0])[0]
    return 9, struct.pack("<IQ", kind, len(value)) + b"".join(gguf_value(item)[1] for item in value)


def write_gguf(path, metadata, version=3):
    pairs = b"".join(gguf_value(key)[1] + struct.pack("<I", gguf_value(value)[0]) + gguf_value(value)[1]
                     for key, value in metadata.items())
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, len(metadata)) + pairs)
    return path


def test_a_folder_of_its_files_gives_the_same_tokenizer(tokenizer, tmp_path):
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_text(content)
    again = load_tokenizer(tmp_path)
    assert again.sha256 == tokenizer.sha256
    for fact in ("eos_id", "eos_ids", "bos_id", "add_bos", "chat_template", "special_tokens"):
        assert getattr(again, fact) == getattr(tokenizer, fact), fact


@pytest.mark.parametrize("case", GOLDEN["tokenizer_cases"] + GOLDEN["nll"], ids=lambda case: ascii(case["text"][:12]))
def test_gguf_tokenizer_gives_the_golden_ids(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["text"]


def test_rendered_prompt_is_the_golden_one(tokenizer):
    text = tokenizer.render(GOLDEN["messages"], add_generation_prompt=True)
    assert text == GOLDEN["prompt"]
    assert tokenizer.encode(text) == GOLDEN["prompt_ids"]


def test_metadata_is_read_as_it_was_written():
    metadata = read_metadata(MODEL)
    assert {key: metadata[key] for key in GOLDEN["metadata"]} == GOLDEN["metadata"]
    assert len(metadata["tokenizer.ggml.merges"]) == GOLDEN["file"]["merges"]


def test_special_tokens_come_from_the_file(tokenizer):
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.add_bos, tokenizer.vocab_size) == ((2,), 1, False, 49152)
    assert tokenizer.decode([1, 19556, 2], skip_special=True) == "Hello"


def test_an_id_without_a_token_is_no_text(tokenizer):
    """A model may have more rows than its tokenizer has tokens, and may draw any of them."""
    assert tokenizer.decode([19556, 49152, 905]) == tokenizer.decode([19556, 905])
    with pytest.raises(PrepareError, match="token id -1"):
        tokenizer.decode([-1])


def test_run_of_bytes_without_a_token_is_one_unknown(tokenizer):
    assert tokenizer.encode("a\x04\x06b") == [tokenizer.encode("a")[0], 0, tokenizer.encode("b")[0]]


def test_pre_tokeniser_follows_the_file(tmp_path):
    metadata = read_metadata(MODEL) | {"tokenizer.ggml.pre": "gpt-2"}
    gpt2 = load_tokenizer(write_gguf(tmp_path / "m.gguf", metadata))
    for case in GOLDEN["tokenizer_cases"]:
        assert gpt2.encode(case["text"]) == (case["ids_if_gpt2_pretokenizer"] or case["ids"])


TINY = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3], "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.ggml.add_bos_token": False,
}


@pytest.mark.parametrize("pre, pieces, add_bos", [
    ("llama-bpe", ["I", "'LL", "\u0120pay", "\u0120", "123", "45", "!\u010a", "a"], True),
    ("qwen2", ["I", "'LL", "\u0120pay", "\u0120", "1", "2", "3", "4", "5", "!\u010a", "a"], False),
])
def test_llama_and_qwen_cut_words_and_digits_their_way(tmp_path, pre, pieces, add_bos):
    metadata = {key: value for key, value in TINY.items() if key != "tokenizer.ggml.add_bos_token"}
    model = load_tokenizer(write_gguf(tmp_path / "m.gguf", metadata | {"tokenizer.ggml.pre": pre}))
    assert [piece for piece, _ in model.core.pre_tokenizer.pre_tokenize_str("I'LL pay 12345!\na")] == pieces
    assert model.add_bos == add_bos


@pytest.mark.parametrize("change, message", [
    ({"tokenizer.ggml.pre": "klingon"}, "'klingon'; known are gpt-2, smollm"),
    ({"tokenizer.ggml.pre": "default"}, "'default'; known are"),
    ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama'"),
    ({"tokenizer.ggml.token_type": [1]}, "missing or disagree"),
    ({"tokenizer.ggml.eos_token_id": 9}, "eos_token_id = 9 is not a token"),
    ({"tokenizer.ggml.tokens": ["a", "a", "ab", "<e>"]}, "a token twice"),
    ({"tokenizer.ggml.merges": ["a c"]}, "tokenizer.ggml.merges"),
    ({"tokenizer.ggml.merges": ["ab"]}, "tokenizer.ggml.merges"),
    ({"tokenizer.ggml.merges": [1, 2]}, "malformed"),
    ({"tokenizer.ggml.tokens": [1, 2, 3, 4]}, "malformed|merges"),
    ({"tokenizer.chat_template": 7}, "chat template"),
])
def test_tokenizer_that_cannot_be_rebuilt_is_an_error(tmp_path, change, message):
    with pytest.raises(PrepareError, match=message):
        load_tokenizer(write_gguf(tmp_path / "m.gguf", TINY | change))


def test_every_truncation_of_a_gguf_file_is_an_error(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf", TINY).read_bytes()
    assert load_tokenizer(tmp_path / "m.gguf").encode("abba<e>") == [2, 1, 0, 3]
    for length in range(len(whole)):
        (tmp_path / "m.gguf").write_bytes(whole[:length])
        with pytest.raises(PrepareError, match="GGUF"):
            load_tokenizer(tmp_path / "m.gguf")


@pytest.mark.parametrize("pair, message", [
    (struct.pack("<IIQ", 9, 8, 1 << 60), "an array runs past"),
    (struct.pack("<IIQ", 9, 4, 1 << 62), "a value runs past"),
    (struct.pack("<IQ", 8, 1 << 63), "a string runs past"),
    (struct.pack("<IB", 7, 2), "neither 0 nor 1"),
    (struct.pack("<I", 99), "value type 99"),
    (struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 6, "nesting 4"),
    (struct.pack("<IQ", 8, 1) + b"\xff", "not UTF-8"),
])
def test_lying_gguf_value_is_an_error(tmp_path, pair, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + pair + bytes(16))
    with pytest.raises(PrepareError, match=message):
        read_metadata(path)


@pytest.fixture
def hf_directory(tmp_path, tokenizer):
    """The embedded model's tokenizer as a Hugging Face directory that adds bos to plain text."""
    folder = tmp_path / "hf"
    folder.mkdir()
    description = json.loads(tokenizer.core.to_str())
    bos = {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
    description["post_processor"] = {
        "type": "TemplateProcessing", "special_tokens": {"<|im_start|>": bos}, "pair": [],
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    description["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(description))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>",
         "chat_template": [{"name": "tools", "template": "no"}, {"name": "default", "template": "config"}]}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return folder


def test_hugging_face_directory_is_the_same_tokenizer(hf_directory, tokenizer):
    model = load_tokenizer(hf_directory)
    assert model.sha256 == tokenizer.sha256
    assert (model.eos_id, model.eos_ids, model.bos_id, model.add_bos) == (2, (2, 0), 1, True)
    for case in GOLDEN["tokenizer_cases"]:
        assert model.encode(case["text"]) == case["ids"]
        assert model.encode(case["text"], add_bos=True) == [1, *case["ids"]]


def test_text_without_an_encoding_is_an_error(tokenizer):
    words = replace(tokenizer, core=tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]")))
    assert words.encode("a") == [0]
    with pytest.raises(PrepareError, match="refuses this text"):
        words.encode("b")


def test_template_file_wins_over_the_configuration(hf_directory):
    assert load_tokenizer(hf_directory).render([], False) == "config"
    (hf_directory / "chat_template.jinja").write_text("{{ bos_token }}{{ messages | tojson }}")
    assert load_tokenizer(hf_directory).render([{"x": "<\u00e9>"}], False) == '<|im_start|>[{"x": "<\u00e9>"}]'


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer_config.json", b"[" * 100_000, "not valid JSON"),
    ("tokenizer_config.json", b'{"chat_template": 5}', "chat template"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": "default", "template": 5}]}', "chat template"),
    ("tokenizer_config.json", b'{"eos_token": "\\ud800"}', "malformed"),
    ("chat_template.jinja", b"caf\xe9", "not UTF-8"),
    ("config.json", b'{"eos_token_id": "x"}', "eos_token_id = 'x'"),
    ("config.json", b'{"eos_token_id": [2, -1]}', "eos_token_id = -1"),
    ("config.json", b'{"eos_token_id": true}', "eos_token_id = True"),
])
def test_directory_that_is_malformed_is_an_error_in_the_data(hf_directory, name, content, message):
    (hf_directory / name).write_bytes(content)
    with pytest.raises(PrepareError, match=message) as error:
        load_tokenizer(hf_directory)
    assert error.value.exit_code == DATA


# --- chat template -----------------------------------------------------------------------------------------------

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template, message", [
    ("{{ 'a' * 900000000 }}", "too much memory"),
    ("{{ (messages | string) * 900000000 }}", "too much memory"),
    (LOOP, "took longer than"),
    ("{% set n = 3 %}{{ n ** 99999999 % 7 }}", "took longer than"),
    ("{{ 'a' * 9000000 }}", "characters"),
    ("{{" + "(" * 100_000 + "}}", "does not compile"),
])
def test_template_that_takes_too_much_is_an_error(tokenizer, monkeypatch, template, message):
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 0.2)
    started = time.process_time()
    with pytest.raises(PrepareError, match=message) as error:
        replace(tokenizer, chat_template=template).render(messages(*CHAT), True)
    assert error.value.exit_code == DATA and time.process_time() - started < 10
    assert tokenizer.render(GOLDEN["messages"], True) == GOLDEN["prompt"]


def test_limits_end_with_the_template(tokenizer):
    before = resource.getrlimit(resource.RLIMIT_AS)
    tokenizer.render(GOLDEN["messages"], True)
    assert resource.getrlimit(resource.RLIMIT_AS) == before and signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


# --- targets -----------------------------------------------------------------------------------------------------

def test_answer_and_its_end_token_are_the_targets(tokenizer):
    (sample,) = encode_chats(tokenizer, ["x"], [messages(*CHAT)])
    answer = tokenizer.encode("A force.")
    assert sample.tokens == [*GOLDEN["prompt_ids"], *answer, 2, 198]
    assert sample.mask == [0] * len(GOLDEN["prompt_ids"]) + [1] * (len(answer) + 1) + [0]


def test_every_assistant_turn_is_a_target(tokenizer):
    chat = messages(("system", "Be brief."), ("user", "2+2?"), ("assistant", "Four."),
                    ("user", "3+3?"), ("assistant", "Six, \u4f60."), ("user", "Thanks"))
    (sample,) = encode_chats(tokenizer, ["x"], [chat])
    assert tokenizer.decode(sample.targets()) == "Four.<|im_end|>Six, \u4f60.<|im_end|>"
    assert tokenizer.decode(sample.tokens) == tokenizer.render(chat, False)


def test_token_that_begins_in_the_prompt_is_no_target(tokenizer):
    template = ("{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
                "{% if add_generation_prompt %}assistant:{% endif %}")
    model = replace(tokenizer, chat_template=template)
    (sample,) = encode_chats(model, ["x"], [messages(CHAT[0], ("assistant", ":ok"))])
    assert tokenizer.encode("::") == [9533] and list(sample.tokens[-3:]) == [9533, *tokenizer.encode("ok"), 2]
    assert sample.mask[-3:] == [0, 1, 1] and sum(sample.mask) == 2


@pytest.mark.parametrize("template, message", [
    ("{% for m in messages %}{{ m.content }}<|im_end|>{{ '!' if loop.last }}{% endfor %}", "differently inside"),
    ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no special token"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{% for %}", "does not compile"),
])
def test_template_that_hides_the_answer_is_an_error(tokenizer, template, message):
    model = replace(tokenizer, chat_template=template)
    with pytest.raises(PrepareError, match=message):
        encode_chats(model, ["f:1"], [messages(*CHAT, *CHAT)])


def test_generation_blocks_are_accepted(tokenizer):
    model = replace(tokenizer, chat_template="{% generation %}{{ strftime_now('%%') }}{% endgeneration %}")
    assert model.render([], False) == "%"


def test_documents_are_split_without_loss(tokenizer):
    text = "one two three four five six"
    ids = [1, *tokenizer.encode(text), 2]
    (pieces,) = encode_documents(replace(tokenizer, add_bos=True), [text], max_length=3)
    assert [token for piece in pieces for token in piece.tokens] == ids[: len(ids) // 3 * 3 + (len(ids) % 3 > 1) * 2]
    assert all(piece.mask == [0, 1, 1][: len(piece.tokens)] for piece in pieces)
