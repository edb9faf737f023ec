"""The tokenizer of a model, from a Hugging Face directory or from the metadata of a GGUF file.

Both end in one `tokenizers.Tokenizer`, so text is cut the way the model was trained on it. What
cannot be rebuilt exactly (an unknown pre-tokeniser, SentencePiece inside GGUF) is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from errors import USAGE, PrepareError
from gguf_metadata import read_metadata

if TYPE_CHECKING:
    from chat_template import ChatTemplate, Message

# GGUF token types.
_CONTROL, _USER_DEFINED = 3, 4

# Llama 3 and Qwen 2 differ in how many digits stay together.
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, with the model's own special tokens and chat template."""

    core: tokenizers.Tokenizer
    eos_id: int | None  # ends a document
    eos_ids: tuple[int, ...]  # any of these ends a generation
    bos_id: int | None
    add_bos: bool  # whether the model expects bos_id before plain text
    chat_template: str | None
    special_tokens: Mapping[str, str]  # what a template may name: bos_token, eos_token, ...

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """The ids of `text`; special tokens written in it count as such, none is added but bos."""
        ids = self.encode_batch([text])[0].ids
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def encode_batch(self, texts: Sequence[str], offsets: bool = False) -> list[tokenizers.Encoding]:
        """Many texts in parallel, nothing added. @throws PrepareError if a text has no encoding"""
        encode = self.core.encode_batch if offsets else self.core.encode_batch_fast
        try:
            return encode(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise PrepareError(f"the model's tokenizer refuses this text: {error}") from None

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`. One without a token is no text: models pad their vocabulary, and draw such rows.

        @throws PrepareError if an id is negative
        """
        if min(ids, default=0) < 0:
            raise PrepareError(f"token id {min(ids)} is negative")
        return self.core.decode([i for i in ids if i < self.vocab_size], skip_special_tokens=skip_special)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text of a conversation by the model's chat template."""
        return self._template.render(messages, add_generation_prompt)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def turn_end_ids(self) -> frozenset[int]:
        """Tokens that may close a turn: the special ones, and those that end a generation."""
        added = self.core.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special) | set(self.eos_ids)

    @cached_property
    def sha256(self) -> str:
        """Hash of the tokenizer's JSON with sorted keys and no white space; the template is not in it."""
        canonical = json.dumps(json.loads(self.core.to_str()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def files(self) -> dict[str, str]:
        """What a Hugging Face folder with this tokenizer holds: file name to content."""
        core = tokenizers.Tokenizer.from_str(self.core.to_str())
        if self.add_bos and self.bos_id is not None:
            bos = core.id_to_token(self.bos_id)
            core.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, self.bos_id)])
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": self.add_bos,
                  "clean_up_tokenization_spaces": False, **self.special_tokens}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        stops = {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos_ids) or None}
        return {"tokenizer.json": core.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=2),
                "generation_config.json": json.dumps(stops, indent=2)}

    @cached_property
    def _template(self) -> ChatTemplate:
        from chat_template import ChatTemplate  # Jinja costs start-up time only where it is used

        if self.chat_template is None:
            raise PrepareError("the model has no chat template: use an instruct model, or kind text",
                               USAGE)
        return ChatTemplate(self.chat_template, self.special_tokens)


def load_tokenizer(model: Path) -> Tokenizer:
    """The tokenizer of `model`, a GGUF file or a directory with tokenizer.json.

    @throws PrepareError if it is neither, or holds a tokenizer that cannot be rebuilt exactly
    """
    if not model.exists():
        raise PrepareError(f"{model}: no such model; give a GGUF file or a Hugging Face directory", USAGE)
    try:
        return _from_directory(model) if model.is_dir() else _from_gguf(model)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a field unlike everywhere else
        raise PrepareError(f"{model}: malformed tokenizer description: {error!r}") from None


def _from_directory(folder: Path) -> Tokenizer:
    if not (folder / "tokenizer.json").exists():
        raise PrepareError(f"{folder}: no tokenizer.json in it; a directory needs the fast tokenizer "
                           "(AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it)", USAGE)
    description = _read_json(folder / "tokenizer.json")
    config = _read_json(folder / "tokenizer_config.json")
    special = {key: value["content"] if isinstance(value, dict) else value
               for key in ("bos_token", "eos_token", "unk_token", "pad_token")
               if (value := config.get(key)) is not None}
    core = _build(description, folder)
    bos_id, eos_id = (core.token_to_id(special[key]) if key in special else None
                      for key in ("bos_token", "eos_token"))
    add_bos = config.get("add_bos_token")
    if add_bos is None:
        add_bos = bos_id is not None and core.encode("a").ids[:1] == [bos_id]
    # Without its post-processor the tokenizer adds nothing and reports untrimmed offsets.
    core = _build(description | {"post_processor": None, "truncation": None, "padding": None}, folder)
    stops = [i for name in ("generation_config.json", "config.json") for i in _stop_ids(folder / name)]
    return Tokenizer(core, eos_id, _unique([*stops, eos_id]), bos_id, bool(add_bos),
                     _directory_template(folder, config), special)


def _stop_ids(path: Path) -> list[int]:
    """eos_token_id of a configuration: nothing, an id or a list of them."""
    stops = _read_json(path).get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    for i in stops:
        if type(i) is not int or not 0 <= i < 1 << 31:
            raise PrepareError(f"{path}: eos_token_id = {i!r} is not a token")
    return stops


def _directory_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise PrepareError(f"{path}: not UTF-8: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return _checked_template(folder / "tokenizer_config.json", template)


def _checked_template(path: Path, template: Any) -> str | None:
    if template is None or isinstance(template, str):
        return template
    raise PrepareError(f"{path}: the chat template is {type(template).__name__}, expected text")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise PrepareError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise PrepareError(f"{path}: expected a JSON object")
    return content


def _build(description: Mapping[str, Any], where: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library raises plain Exception
        raise PrepareError(f"{where}/tokenizer.json: {error}") from None


def _from_gguf(path: Path) -> Tokenizer:
    metadata = read_metadata(path)

    def field(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    if field("model") != "gpt2":
        raise PrepareError(f"{path}: tokenizer.ggml.model is {field('model')!r}; byte-level BPE ('gpt2') "
                           "is read from GGUF, give the Hugging Face directory of this model", USAGE)
    tokens, types, merges = field("tokens"), field("token_type"), field("merges")
    if not tokens or not isinstance(types, list) or not merges or len(types) != len(tokens):
        raise PrepareError(f"{path}: tokenizer.ggml tokens, token_type and merges are missing or disagree")
    ids = {key: field(f"{key}_token_id") for key in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    for key, token in ids.items():
        if token is not None and not (isinstance(token, int) and 0 <= token < len(tokens)):
            raise PrepareError(f"{path}: tokenizer.ggml.{key}_token_id = {token} is not a token")
    core = _byte_level_bpe(path, tokens, merges, field("pre"), ids["unknown"])
    core.add_special_tokens(
        [AddedToken(tokens[i], special=True, normalized=False)
         for i, kind in enumerate(types) if kind == _CONTROL])
    core.add_tokens([AddedToken(tokens[i], special=False, normalized=False)
                     for i, kind in enumerate(types) if kind == _USER_DEFINED])
    special = {f"{name}_token": tokens[ids[key]]
               for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
               if ids[key] is not None}
    return Tokenizer(core, ids["eos"], _unique([ids["eos"], ids["eot"], ids["eom"]]), ids["bos"],
                     bool(field("add_bos_token", field("pre") == "llama-bpe")),
                     _checked_template(path, metadata.get("tokenizer.chat_template")), special)


def _byte_level_bpe(path: Path, tokens: list[str], merges: list[str], pre: str | None,
                    unknown: int | None) -> tokenizers.Tokenizer:
    """Byte-level BPE. A run of bytes that the vocabulary lacks becomes one unknown token."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise PrepareError(f"{path}: tokenizer.ggml.tokens holds a token twice")
    splitters = _pre_tokenizer(path, pre)
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        core = tokenizers.Tokenizer(models.BPE(
            vocab=vocabulary, merges=pairs, fuse_unk=True, ignore_merges=pre == "llama-bpe",
            unk_token=None if unknown is None else tokens[unknown]))
    except Exception as error:  # the library raises plain Exception
        raise PrepareError(f"{path}: tokenizer.ggml.merges: {error}") from None
    if pre == "qwen2":
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = splitters
    core.decoder = decoders.ByteLevel()
    return core


def _pre_tokenizer(path: Path, pre: str | None) -> pre_tokenizers.PreTokenizer:
    """The pre-tokeniser that llama.cpp's tokenizer.ggml.pre names."""
    def words(digits: str) -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Split(Regex(_WORDS % digits), "isolated")

    # What cuts before the bytes, and whether ByteLevel cuts by the GPT-2 expression.
    known: dict[str, tuple[list[pre_tokenizers.PreTokenizer], bool]] = {
        "gpt-2": ([], True),
        "smollm": ([pre_tokenizers.Digits(individual_digits=True)], True),
        "llama-bpe": ([words(r"\p{N}{1,3}")], False),
        "qwen2": ([words(r"\p{N}")], False),
    }
    if pre is None or pre not in known:
        raise PrepareError(f"{path}: tokenizer.ggml.pre is {pre!r}; known are {', '.join(known)}. "
                           "Give the Hugging Face directory of this model", USAGE)
    first, by_regex = known[pre]
    return pre_tokenizers.Sequence(
        [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_regex)])


def _unique(ids: Sequence[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(i for i in ids if i is not None))
