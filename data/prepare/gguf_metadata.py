"""Reads the key/value metadata of a GGUF file (version 2 or 3, little-endian) and nothing else.

The file is untrusted: every count and length is checked against the bytes that are left before
anything is allocated, keys must be unique, and arrays nest at most four deep.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from errors import PrepareError

_SCALARS = {  # value type -> struct code
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_NESTING = 4


class _Cursor:
    """Walks over the bytes of the file; each read is bounds-checked."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data, self.name, self.position = data, name, 0

    def fail(self, what: str) -> PrepareError:
        return PrepareError(f"{self.name}: not a valid GGUF file: {what} at byte {self.position}")

    def need(self, num_bytes: int, what: str) -> None:
        if num_bytes > len(self.data) - self.position:
            raise self.fail(f"{what} runs past the end of the file")

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize("<" + code)
        self.need(size * count, "a value")
        if code == "?" and self.data[self.position : self.position + count].strip(b"\0\1"):
            raise self.fail("a bool that is neither 0 nor 1")
        values = struct.unpack_from(f"<{count}{code}", self.data, self.position)
        self.position += size * count
        return values

    def string(self) -> str:
        (length,) = self.scalars("Q", 1)
        self.need(length, "a string")
        raw = self.data[self.position : self.position + length]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a string that is not UTF-8") from None
        self.position += length
        return text

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalars(_SCALARS[kind], 1)[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth == _MAX_NESTING:
            raise self.fail(f"value type {kind} (nesting {depth})")
        (element_kind,) = self.scalars("I", 1)
        (count,) = self.scalars("Q", 1)
        if element_kind in _SCALARS:
            return list(self.scalars(_SCALARS[element_kind], count))
        self.need(8 * count, "an array")  # a string or an array takes at least eight bytes
        return [self.value(element_kind, depth + 1) for _ in range(count)]


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file: integers, floats, bools, strings and lists of them.

    @throws PrepareError if the file is not GGUF, is cut short or contradicts itself
    """
    if path.stat().st_size < 24:
        raise PrepareError(f"{path}: not a GGUF file: shorter than its header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, str(path))
        if data[:4] != b"GGUF":
            raise PrepareError(f"{path}: not a GGUF file: it starts with {data[:4]!r}")
        cursor.position = 4
        (version,) = cursor.scalars("I", 1)
        if version not in (2, 3):
            raise PrepareError(f"{path}: GGUF version {version}; 2 and 3 are read")
        _, num_pairs = cursor.scalars("Q", 2)  # the first is the number of tensors
        cursor.need(13 * num_pairs, "the metadata")
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = cursor.string()
            if key in metadata:
                raise cursor.fail(f"key {key} given twice")
            (kind,) = cursor.scalars("I", 1)
            metadata[key] = cursor.value(kind)
        return metadata
