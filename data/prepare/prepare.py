"""`graft prepare KIND`: raw text, conversations or labelled texts to HDF5 shards that `graft train` reads.

Reads with records.py, encodes with samples.py and the model's own tokenizer, writes with shards.py.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import records
from errors import USAGE, PrepareError, run_reporting_errors
from samples import Sample, encode_chats, encode_documents, encode_texts, encode_words
from shards import SPLITS, Description, ShardSet, split_of
from tokenizer import Tokenizer, load_tokenizer

CREATED_BY = "graft prepare"
BATCH = 256  # records encoded together, in parallel
DEFAULT_PROMPT = "{text}\n\nAnswer with one of: {labels}."
INPUT_HELP = """\
input files:
  text            .txt (a file is a document) or .jsonl with "text" in each line
  chat            .jsonl in one of four forms, found by its keys:
                  {"messages": [{"role", "content"}, ...]}         roles system, user, assistant
                  {"prompt", "completion"}
                  {"instruction", "input" (optional), "output"}    Alpaca
                  {"conversations": [{"from", "value"}, ...]}      ShareGPT
  classification  .jsonl, .csv or .tsv with "text" and "label": the question by --prompt and the label as the
                  answer, or with --plain the text alone; .jsonl with "tokens" and "labels", two lists of
                  equal length: words with a label each, null for none
examples:
  graft prepare chat --input answers.jsonl --model models/m.gguf --output data/cache/answers
  graft prepare text --input book.txt --model models/Llama-3-8B --output data/cache/book --max-length 1024
"""
T = TypeVar("T")


@dataclass
class Job:
    """One run: what was asked for, the labels of a classification, and what happened to the records."""

    options: argparse.Namespace
    tokenizer: Tokenizer
    labels: Sequence[str] = ()
    label_tokens: Sequence[tuple[int, ...]] = ()
    num_records: int = 0
    num_cut: int = 0  # documents split, conversations shortened
    num_dropped: int = 0  # records with no target left

    def read(self, reader: Callable[[Path], Iterator[tuple[str, T]]]) -> Iterator[tuple[str, T]]:
        """The records of all input files, at most --max-samples-per-file of each."""
        for path in self.options.input:
            yield from itertools.islice(reader(path), self.options.max_samples_per_file)


def main() -> None:
    options = parse_arguments()
    started = time.monotonic()
    for path in options.input:
        if not path.is_file():
            raise PrepareError(f"{path}: no such file", USAGE)
    job = Job(options, load_tokenizer(options.model))
    encode = {"text": text_samples, "chat": chat_samples, "classification": labelled_samples}
    if options.kind == "classification" and records.labels_words(options.input[0]):
        encode["classification"] = word_labelled_samples
        read_word_labels(job)
    elif options.kind == "classification":
        read_labels(job)
    description = Description(CREATED_BY, job.tokenizer.sha256, job.tokenizer.vocab_size, job.labels,
                              job.label_tokens)
    with ShardSet(options.output, description, options.shard_tokens) as shards:
        for sample in progress(encode[options.kind](job)):
            shards.add(split_of(sample, options.eval_fraction), sample)
        if not shards.splits["train"].samples:
            raise PrepareError(f"{options.input[0]}: nothing to train on is left of "
                               f"{job.num_records} records, {job.num_dropped} dropped; "
                               "see --max-length and --eval-fraction")
        shards.commit()
    print_summary(shards, job, time.monotonic() - started)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; argparse leaves with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="graft prepare", description="Raw data to HDF5 shards.", epilog=INPUT_HELP, allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100))
    parser.add_argument("kind", choices=("text", "chat", "classification"))
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--model", type=Path, required=True, help="GGUF file or Hugging Face directory")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR",
                        help="gets train-00000.h5 ..., eval-00000.h5 ...; older shards there are replaced")
    parser.add_argument("--eval-fraction", type=float, default=0.05, metavar="F",
                        help="share held out, by a hash of each sample (default 0.05)")
    parser.add_argument("--max-length", type=int, metavar="N",
                        help="tokens a sample; text is split (default 2048), the others are cut "
                             "(default: no limit)")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, metavar="TEMPLATE",
                        help="classification: the user's message, with {text} and {labels}")
    parser.add_argument("--plain", action="store_true",
                        help="classification: the text alone, for a model with a head over labels")
    parser.add_argument("--max-samples-per-file", type=int, metavar="N", help="read the first N records")
    parser.add_argument("--shard-tokens", type=int, default=64 << 20, metavar="N",
                        help="tokens a shard (default 67108864)")
    options = parser.parse_args(arguments)
    if not 0 <= options.eval_fraction < 1:
        parser.error(f"--eval-fraction {options.eval_fraction}: expected 0 <= F < 1")
    if "{text}" not in options.prompt:
        parser.error("--prompt: expected {text} in it")
    for name, least in (("max_length", 2), ("max_samples_per_file", 1), ("shard_tokens", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    return options


def text_samples(job: Job) -> Iterator[Sample]:
    """Documents, split into samples of at most --max-length tokens."""
    for batch in batches(job.read(records.read_documents)):
        texts = [text for _, text in batch]
        for pieces in encode_documents(job.tokenizer, texts, job.options.max_length or 2048):
            job.num_records += 1
            job.num_cut += len(pieces) > 1
            job.num_dropped += not pieces
            yield from pieces


def chat_samples(job: Job) -> Iterator[Sample]:
    """Conversations, the assistant's turns being targets."""
    for batch in batches(job.read(records.read_chats)):
        wheres, chats = zip(*batch)
        yield from shortened(job, encode_chats(job.tokenizer, wheres, chats))


def labelled_samples(job: Job) -> Iterator[Sample]:
    """Labelled texts as conversations that end with the label.

    A label must have the same tokens after every text: it is ranked by those alone.
    """
    number = {label: i for i, label in enumerate(job.labels)}
    for batch in batches(job.read(records.read_labelled)):
        wheres, pairs = zip(*batch)
        if job.options.plain:
            texts, labels = zip(*pairs)
            yield from shortened(job, encode_texts(job.tokenizer, texts, [number[label] for label in labels]))
            continue
        chats = [labelled_chat(job, text, label) for text, label in pairs]
        labelled = []
        for where, (_, label), sample in zip(wheres, pairs, encode_chats(job.tokenizer, wheres, chats)):
            if sample.targets() != job.label_tokens[number[label]]:
                raise PrepareError(f"{where}: label {label!r} has other tokens after this text than after "
                                   "none; the model's chat template must end a question with a special token")
            labelled.append(Sample(sample.tokens, sample.mask, number[label]))
        yield from shortened(job, labelled)


def read_labels(job: Job) -> None:
    """Finds the distinct labels of all input, sorted, and the tokens (with the end token) of each."""
    job.labels = sorted({label for _, (_, label) in job.read(records.read_labelled)})
    if len(job.labels) < 2:
        raise PrepareError(f"{job.options.input[0]}: every record has the label {job.labels[0]!r}; "
                           "expected at least two labels")
    if job.options.plain:
        return
    chats = [labelled_chat(job, "", label) for label in job.labels]
    wheres = [f"label {label!r}" for label in job.labels]
    job.label_tokens = [sample.targets() for sample in encode_chats(job.tokenizer, wheres, chats)]
    seen: dict[tuple[int, ...], str] = {}
    for label, tokens in zip(job.labels, job.label_tokens):
        if tokens in seen:
            raise PrepareError(f"labels {seen[tokens]!r} and {label!r} have the same tokens")
        seen[tokens] = label


def word_labelled_samples(job: Job) -> Iterator[Sample]:
    """Words with labels; the first token of each is a target."""
    number = {label: i for i, label in enumerate(job.labels)}
    for batch in batches(job.read(records.read_labelled_words)):
        sentences = [(words, [None if label is None else number[label] for label in labels])
                     for _, (words, labels) in batch]
        yield from shortened(job, encode_words(job.tokenizer, sentences))


def read_word_labels(job: Job) -> None:
    """Finds the distinct labels of all words, sorted."""
    job.labels = sorted({label for _, (_, labels) in job.read(records.read_labelled_words)
                         for label in labels if label is not None})
    if len(job.labels) < 2:
        raise PrepareError(f"{job.options.input[0]}: the words have {len(job.labels)} labels, expected at least two")


def labelled_chat(job: Job, text: str, label: str) -> records.Chat:
    """The question by --prompt, and the label as the answer."""
    # {labels} first: a text may hold braces of its own.
    question = job.options.prompt.replace("{labels}", ", ".join(job.labels)).replace("{text}", text)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": label}]


def shortened(job: Job, samples: Iterable[Sample]) -> Iterator[Sample]:
    """Samples cut to --max-length; one that loses a part of its answer, or all targets, is dropped."""
    limit = job.options.max_length
    for sample in samples:
        job.num_records += 1
        if not sample.tokens:
            job.num_dropped += 1
            continue
        if limit is None or len(sample.tokens) <= limit:
            yield sample
            continue
        short = sample.cut(limit)
        whole_answer = sample.label is None or short.targets() == sample.targets()
        if whole_answer and (job.options.plain or any(short.mask)):
            job.num_cut += 1
            yield short
        else:
            job.num_dropped += 1


def batches(items: Iterable[T]) -> Iterator[list[T]]:
    """Lists of up to BATCH items."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, BATCH)):
        yield batch


def progress(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Passes samples on; on a terminal it keeps one line of counts up to date."""
    if not sys.stderr.isatty():
        yield from samples
        return
    started = shown = time.monotonic()
    tokens = 0
    try:
        for number, sample in enumerate(samples, 1):
            tokens += len(sample.tokens)
            yield sample
            now = time.monotonic()
            if now - shown > 0.5:
                shown = now
                print(f"\r{number:,} samples, {tokens:,} tokens, {tokens / (now - started):,.0f} tokens/s ",
                      end="", file=sys.stderr, flush=True)
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def print_summary(shards: ShardSet, job: Job, seconds: float) -> None:
    """What was written, what was lost, and where it is."""
    options = job.options
    print(f"{job.num_records:,} records of {len(options.input)} files in {seconds:.1f} s; "
          f"{job.num_cut:,} {'split' if options.kind == 'text' else 'cut'}, {job.num_dropped:,} dropped")
    for name in SPLITS:
        split = shards.splits[name]
        where = f"{options.output}/{name}-*.h5 ({len(split.files)})" if split.files else "no shard"
        print(f"  {name:5} {split.samples:9,} samples {split.tokens:11,} tokens "
              f"{split.targets:11,} targets  {where}")
    if options.eval_fraction and not shards.splits["eval"].samples:
        print("warning: no sample fell into eval; raise --eval-fraction", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_reporting_errors("graft prepare", main))
