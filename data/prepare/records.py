"""Reads what users bring: documents, conversations in four common forms, labelled texts.

Every reader yields (where, value), `where` being `file:line`, and fails there on what it does not
understand. Files are UTF-8; lines of a JSON Lines file are read one at a time.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import USAGE, PrepareError

MAX_LINE_BYTES = 64 << 20  # a longer line is not a record but a file in another format

Record = dict[str, Any]
Chat = list[dict[str, str]]

_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = _ROLES | {"human": "user", "gpt": "assistant"}
_FORMS = {  # form -> keys it is known by
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "Alpaca": ("instruction", "output"),
    "ShareGPT": ("conversations",),
}


def read_documents(path: Path) -> Iterator[tuple[str, str]]:
    """.txt: the file is one document; .jsonl: the `text` of each line."""
    if path.suffix == ".txt":
        text = "".join(line for _, line in _lines(path))
        if not text.strip():
            raise PrepareError(f"{path}: holds no text")
        yield str(path), text
        return
    for where, record in _json_lines(path, "text"):
        yield where, _text(where, record, "text")


def read_chats(path: Path) -> Iterator[tuple[str, Chat]]:
    """Conversations of a .jsonl file; the form is that of its first record, and of all."""
    form = None
    for where, record in _json_lines(path, "chat"):
        forms = [name for name, keys in _FORMS.items() if all(key in record for key in keys)]
        if len(forms) != 1:
            known = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in _FORMS.items())
            raise PrepareError(f"{where}: keys {sorted(record)} are {'several forms' if forms else 'no form'}"
                               f" of a conversation ({known})")
        form = form or forms[0]
        if forms[0] != form:
            raise PrepareError(f"{where}: form {forms[0]}, but the file began with {form}; "
                               "one file holds one form")
        yield where, _check_chat(where, _to_messages(where, record, form))


def read_labelled(path: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """(text, label) from .jsonl, or from .csv or .tsv with a header that names both columns."""
    delimiters = {".csv": ",", ".tsv": "\t"}
    records = (_table(path, delimiters[path.suffix]) if path.suffix in delimiters
               else _json_lines(path, "classification"))
    for where, record in records:
        if isinstance(record.get("label"), int) and not isinstance(record["label"], bool):
            record["label"] = str(record["label"])
        text, label = _text(where, record, "text"), _text(where, record, "label").strip()
        if not label or "\0" in label:
            raise PrepareError(f"{where}: the label is {'not text' if label else 'empty'}")
        yield where, (text, label)


def labels_words(path: Path) -> bool:
    """Whether a file's records label words, by its first one: {"tokens": [...], "labels": [...]}."""
    return path.suffix == ".jsonl" and "tokens" in next(_json_lines(path, "classification"))[1]


def read_labelled_words(path: Path) -> Iterator[tuple[str, tuple[list[str], list[str | None]]]]:
    """(words, their labels) from .jsonl; a word whose label is null is none to learn."""
    for where, record in _json_lines(path, "classification"):
        words, labels = record.get("tokens"), record.get("labels")
        if not isinstance(words, list) or not isinstance(labels, list) or len(words) != len(labels) or not words:
            raise PrepareError(f"{where}: 'tokens' and 'labels' are not two lists of equal length")
        texts, names = [], []
        for number, (word, label) in enumerate(zip(words, labels), 1):
            at = f"{where}: word {number}"
            if isinstance(label, int) and not isinstance(label, bool):
                label = str(label)
            texts.append(_text(at, {"tokens": word}, "tokens"))
            names.append(None if label is None else _text(at, {"labels": label}, "labels").strip())
            if not texts[-1].strip() or names[-1] == "" or "\0" in (names[-1] or ""):
                raise PrepareError(f"{at}: the word or its label is empty")
        yield where, (texts, names)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, ends kept; a byte-order mark is dropped."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise PrepareError(f"{path}:{number}: line of more than {MAX_LINE_BYTES >> 20} MiB")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise PrepareError(f"{path}:{number}: not UTF-8: byte {error.object[error.start]:#04x} "
                                   f"at column {error.start + 1}") from None


def _json_lines(path: Path, kind: str) -> Iterator[tuple[str, Record]]:
    if path.suffix != ".jsonl":
        raise PrepareError(f"{path}: kind {kind} does not read {path.suffix or 'such'} files; "
                           "see --help for its input", USAGE)
    empty = True
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PrepareError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise PrepareError(f"{where}: expected a JSON object, found {type(record).__name__}")
        empty = False
        yield where, record
    if empty:
        raise PrepareError(f"{path}: holds no records")


def _table(path: Path, delimiter: str) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.DictReader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    try:
        missing = {"text", "label"} - set(reader.fieldnames or ())
        if missing:
            raise PrepareError(f"{path}:1: the header names no column {' or '.join(sorted(missing))}")
        twice = sorted({name for name in reader.fieldnames if name and reader.fieldnames.count(name) > 1})
        if twice:
            raise PrepareError(f"{path}:1: the header names the column {' and '.join(twice)} twice")
        empty = True
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise PrepareError(f"{where}: another number of fields than the header")
            empty = False
            yield where, row
    except csv.Error as error:
        raise PrepareError(f"{path}:{reader.reader.line_num}: {error}") from None
    if empty:
        raise PrepareError(f"{path}: holds no records")


def _text(where: str, record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        found = f"is {type(value).__name__}" if key in record else "is missing"
        raise PrepareError(f"{where}: {key!r} {found}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, UTF-8 cannot
        raise PrepareError(f"{where}: {key!r} holds half a surrogate pair") from None
    return value


def _to_messages(where: str, record: Record, form: str) -> Chat:
    if form == "messages":
        return _turns(where, record, "messages", ("role", "content"), _ROLES)
    if form == "ShareGPT":
        return _turns(where, record, "conversations", ("from", "value"), _SHAREGPT_ROLES)
    if form == "Alpaca":
        question, answer = _text(where, record, "instruction"), _text(where, record, "output")
        if record.get("input"):
            question += "\n\n" + _text(where, record, "input")
    else:
        question, answer = _text(where, record, "prompt"), _text(where, record, "completion")
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if record.get("system"):
        chat.insert(0, {"role": "system", "content": _text(where, record, "system")})
    return chat


def _turns(where: str, record: Record, key: str, fields: tuple[str, str], roles: dict[str, str]) -> Chat:
    turns = record[key]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise PrepareError(f"{where}: {key!r} is not a list of objects")
    chat = []
    for number, turn in enumerate(turns, 1):
        at = f"{where}: {key}[{number}]"
        role = _text(at, turn, fields[0])
        if role not in roles:
            raise PrepareError(f"{at}: unknown role {role!r}; known are {', '.join(roles)}")
        chat.append({"role": roles[role], "content": _text(at, turn, fields[1])})
    return chat


def _check_chat(where: str, chat: Chat) -> Chat:
    answers = [message["content"] for message in chat if message["role"] == "assistant"]
    if not answers:
        raise PrepareError(f"{where}: no assistant turn, so nothing to learn")
    if not all(answer.strip() for answer in answers):
        raise PrepareError(f"{where}: an assistant turn is empty")
    return chat
