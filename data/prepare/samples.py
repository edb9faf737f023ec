"""Turns documents and conversations into token ids and a loss mask: which tokens are targets.

Chat targets are found by rendering prefixes with the model's own template: what
`messages[:i+1]` adds to `messages[:i]` with the generation prompt is what the model has to write.
The whole conversation is encoded once; a token belongs to the span its first character lies in, so
one that begins in the prompt and reaches into the answer is not a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from errors import USAGE, PrepareError

if TYPE_CHECKING:
    from chat_template import Message
    from tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """One row of a shard. `mask[i]` is 1 if token i is predicted from those before it."""

    tokens: Sequence[int]
    mask: Sequence[int]
    label: int | None = None
    token_labels: Sequence[int] | None = None  # where mask is 1

    def targets(self) -> tuple[int, ...]:
        """The ids the model learns to write."""
        return tuple(token for token, target in zip(self.tokens, self.mask) if target)

    def cut(self, max_length: int) -> Sample:
        """The first `max_length` tokens."""
        labels = None if self.token_labels is None else self.token_labels[:max_length]
        return Sample(self.tokens[:max_length], self.mask[:max_length], self.label, labels)


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> list[list[Sample]]:
    """Each text as consecutive samples of at most `max_length` tokens that together hold all of it.

    A document starts with the bos token if the model expects one and ends with its eos token. The
    first token of a sample has nothing before it, so it is no target; a sample of one is left out.
    """
    if tokenizer.eos_id is None:
        raise PrepareError("the model names no end-of-text token (eos), so documents cannot end", USAGE)
    start = _start(tokenizer)
    documents = []
    for encoding in tokenizer.encode_batch(texts):
        ids = [*start, *encoding.ids, tokenizer.eos_id]
        pieces = (ids[at : at + max_length] for at in range(0, len(ids), max_length))
        documents.append([Sample(piece, [0] + [1] * (len(piece) - 1)) for piece in pieces if len(piece) > 1])
    return documents


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], labels: Sequence[int]) -> list[Sample]:
    """Each text alone, after the bos token if the model expects one, with its label: no token is a target."""
    samples = []
    for encoding, label in zip(tokenizer.encode_batch(texts), labels):
        ids = [*_start(tokenizer), *encoding.ids]
        samples.append(Sample(ids, [0] * len(ids), label))
    return samples


def encode_words(tokenizer: Tokenizer, sentences: Sequence[tuple[Sequence[str], Sequence[int | None]]]) -> list[Sample]:
    """Words joined by spaces; the first token of a word with a label is a target and has it.

    A token belongs to the word that its first character other than white space lies in.
    """
    texts = [" ".join(words) for words, _ in sentences]
    samples = []
    for text, (words, labels), encoding in zip(texts, sentences, tokenizer.encode_batch(texts, offsets=True)):
        word_at = [number for number, word in enumerate(words) for _ in range(len(word) + 1)]
        start = _start(tokenizer)
        mask, token_labels, seen = [0] * len(start), [0] * len(start), set()
        for begin, end in encoding.offsets:
            inside = text[begin:end]
            first = begin + len(inside) - len(inside.lstrip())
            word = word_at[first] if first < end else None
            label = None if word is None or word in seen else labels[word]
            seen.add(word)
            mask.append(int(label is not None))
            token_labels.append(label or 0)
        samples.append(Sample([*start, *encoding.ids], mask, None, token_labels))
    return samples


def _start(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []


def encode_chats(tokenizer: Tokenizer, wheres: Sequence[str],
                 chats: Sequence[Sequence[Message]]) -> list[Sample]:
    """Each conversation as one sample whose targets are the assistant's texts and end-of-turn tokens.

    @param wheres  `file:line` of each conversation, for errors
    @throws PrepareError if the template rewrites earlier turns or closes none
    """
    rendered = []
    for where, messages in zip(wheres, chats):
        try:
            rendered.append(assistant_spans(tokenizer, messages))
        except PrepareError as error:
            raise PrepareError(f"{where}: {error}", error.exit_code) from None
    encodings = tokenizer.encode_batch([text for text, _ in rendered], offsets=True)
    samples = []
    for where, (text, spans), encoding in zip(wheres, rendered, encodings):
        mask = [0] * len(encoding.ids)
        for span in spans:
            first, last = _answer_tokens(tokenizer, encoding.ids, encoding.offsets, text, span)
            if last < first:
                raise PrepareError(
                    f"{where}: the model's chat template closes the assistant's turn with no special "
                    "token, so the model could not learn to stop", USAGE)
            mask[first : last + 1] = [1] * (last + 1 - first)
        samples.append(Sample(encoding.ids, mask))
    return samples


def assistant_spans(tokenizer: Tokenizer,
                    messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and [begin, end) in characters of what the template writes for each
    assistant message: its text, the end-of-turn token, and white space after it.

    @throws PrepareError if a prefix of the conversation does not render to a prefix of its text
    """
    whole = tokenizer.render(messages, add_generation_prompt=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.render(messages[:i], add_generation_prompt=True)
        after = tokenizer.render(messages[: i + 1], add_generation_prompt=False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise PrepareError(
                f"the model's chat template renders message {i + 1} (assistant) differently inside the "
                "conversation than at its end, so its tokens cannot be told apart; split it into one "
                "conversation per answer that begins with a user message")
        spans.append((len(before), len(after)))
    return whole, spans


def _answer_tokens(tokenizer: Tokenizer, ids: Sequence[int], offsets: Sequence[tuple[int, int]],
                   text: str, span: tuple[int, int]) -> tuple[int, int]:
    """First and last token of an answer, last being the end-of-turn token; last < first if none."""
    begin, end = span
    inside = [i for i, (start, _) in enumerate(offsets) if begin <= start < end]
    for i in reversed(inside):
        if ids[i] in tokenizer.turn_end_ids:
            return inside[0], i
        if text[slice(*offsets[i])].strip():
            break
    return 0, -1
