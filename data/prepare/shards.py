"""Writes token shards (HDF5, format in data/FORMAT.md), all of them or none.

Samples collect in memory up to the size of a shard; shards are written under temporary names and
renamed at the end, so a failed run leaves the folder as it was.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from samples import Sample

SCHEMA = 1
SPLITS = ("train", "eval")
_CHUNK = 262_144  # elements: 1 MiB of tokens, still inside HDF5's default chunk cache
# The latest format that HDF5 1.10, which Debian 12 and Ubuntu 24.04 ship, can read.
_LIBVER = ("v110", "v110")


@dataclass(frozen=True)
class Description:
    """What every shard of a run says about itself."""

    created_by: str
    tokenizer_sha256: str
    vocab_size: int
    labels: Sequence[str] = ()  # classification only
    label_tokens: Sequence[Sequence[int]] = ()  # ids of each label with its end token, where texts end with it


@dataclass
class Split:
    """Counts of one split, and the samples that wait for their shard."""

    samples: int = 0
    tokens: int = 0
    targets: int = 0
    files: list[Path] = field(default_factory=list)
    pending_tokens: array[int] = field(default_factory=lambda: array("I"))
    pending_mask: bytearray = field(default_factory=bytearray)
    pending_offsets: array[int] = field(default_factory=lambda: array("Q", [0]))
    pending_labels: array[int] = field(default_factory=lambda: array("i"))
    pending_token_labels: array[int] = field(default_factory=lambda: array("I"))


def split_of(sample: Sample, eval_fraction: float) -> str:
    """`eval` or `train`, by a hash of the sample's tokens: equal samples always fall together."""
    digest = hashlib.blake2b(np.asarray(sample.tokens, "<u4").tobytes(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "little") < eval_fraction * 2.0**64 else "train"


class ShardSet:
    """The shards of one run in `folder`: `with ShardSet(...) as shards: shards.add(...); shards.commit()`."""

    def __init__(self, folder: Path, description: Description, shard_tokens: int) -> None:
        self.folder, self.description, self.shard_tokens = folder, description, shard_tokens
        self.splits = {name: Split() for name in SPLITS}

    def __enter__(self) -> ShardSet:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for path in self.folder.glob(f".*.h5.{os.getpid()}"):
            path.unlink()

    def add(self, name: str, sample: Sample) -> None:
        """Appends a sample to a split; a shard that it would overfill is written first."""
        split = self.splits[name]
        if split.pending_mask and len(split.pending_mask) + len(sample.tokens) > self.shard_tokens:
            self._write(name)
        split.pending_tokens.extend(sample.tokens)
        split.pending_mask.extend(sample.mask)
        split.pending_offsets.append(len(split.pending_mask))
        if sample.label is not None:
            split.pending_labels.append(sample.label)
        split.pending_token_labels.extend(sample.token_labels or ())
        split.samples += 1
        split.tokens += len(sample.tokens)
        split.targets += sum(sample.mask)

    def commit(self) -> None:
        """Writes what is pending, then puts all shards in place of those of an earlier run."""
        for name, split in self.splits.items():
            if split.pending_mask:
                self._write(name)
        kept = set()
        for split in self.splits.values():
            for path in split.files:
                os.replace(self._temporary(path), path)
                kept.add(path)
        for name in SPLITS:
            for path in set(self.folder.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9].h5")) - kept:
                path.unlink()
        _sync(self.folder)

    def _temporary(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.{os.getpid()}")

    def _write(self, name: str) -> None:
        split = self.splits[name]
        path = self.folder / f"{name}-{len(split.files):05d}.h5"
        num_samples = len(split.pending_offsets) - 1
        with h5py.File(self._temporary(path), "w", libver=_LIBVER) as file:
            file.attrs.update({"graft_schema": SCHEMA, "num_samples": num_samples,
                               "vocab_size": self.description.vocab_size})
            for key, text in (("kind", "tokens"), ("created_by", self.description.created_by),
                              ("tokenizer_sha256", self.description.tokenizer_sha256)):
                file.attrs.create(key, text.encode(), dtype=_fixed_length([text]))
            _put(file, "tokens", np.frombuffer(split.pending_tokens, np.uint32))
            _put(file, "loss_mask", np.frombuffer(split.pending_mask, np.uint8))
            _put(file, "offsets", np.frombuffer(split.pending_offsets, np.uint64))
            if self.description.labels:
                self._write_labels(file, split)
        _sync(self._temporary(path))
        split.files.append(path)
        split.pending_tokens, split.pending_mask = array("I"), bytearray()
        split.pending_offsets, split.pending_labels = array("Q", [0]), array("i")
        split.pending_token_labels = array("I")

    def _write_labels(self, file: h5py.File, split: Split) -> None:
        labels = self.description.labels
        _put(file, "labels", np.array([label.encode() for label in labels], _fixed_length(labels)))
        if split.pending_token_labels:
            _put(file, "token_labels", np.frombuffer(split.pending_token_labels, np.uint32))
        else:
            _put(file, "label", np.frombuffer(split.pending_labels, np.int32))
        if not self.description.label_tokens:
            return
        lengths = [len(tokens) for tokens in self.description.label_tokens]
        _put(file, "label_tokens", np.concatenate(self.description.label_tokens).astype(np.uint32))
        _put(file, "label_offsets", np.cumsum([0, *lengths], dtype=np.uint64))


def _put(file: h5py.File, name: str, data: np.ndarray) -> None:
    file.create_dataset(name, data=data, chunks=(min(len(data), _CHUNK),), fletcher32=True)


def _fixed_length(texts: Sequence[str]) -> Any:
    """UTF-8 of fixed length: variable-length strings lie on HDF5's global heap, which has no checksum."""
    return h5py.string_dtype("utf-8", 1 + max(len(text.encode()) for text in texts))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
