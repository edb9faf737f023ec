"""Renders chat templates the way `transformers` does: sandboxed Jinja with the same globals.

A template comes with the model and is untrusted code, hence the immutable sandbox, and limits on
the time, the memory and the text it takes.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from errors import PrepareError

Message = Mapping[str, str]

CPU_SECONDS = 5.0
MEMORY_BYTES = 512 << 20  # on top of what the process has
# A template adds some words to each message, and a system prompt to all of them.
MAX_GROWTH, MAX_ADDED_CHARACTERS = 16, 1 << 20


class _OutOfTime(BaseException):
    """No Exception: Jinja's constant folding swallows those."""


def _out_of_time(*_: object) -> NoReturn:
    raise _OutOfTime


@contextlib.contextmanager
def _limited(what: str) -> Iterator[None]:
    """Runs foreign code: however it fails, by its own fault or by a limit, is a PrepareError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = in_use + MEMORY_BYTES if soft == resource.RLIM_INFINITY else min(in_use + MEMORY_BYTES, soft)
    handler = signal.signal(signal.SIGPROF, _out_of_time)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        yield
    except _OutOfTime:
        raise PrepareError(f"the model's chat template took longer than {CPU_SECONDS:g} s") from None
    except MemoryError:
        raise PrepareError("the model's chat template took too much memory") from None
    except Exception as error:
        raise PrepareError(f"the model's chat template {what}: {error}") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class _Generation(jinja2.ext.Extension):
    """Accepts `{% generation %} ... {% endgeneration %}`: a plain block here, targets come from prefixes."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


class ChatTemplate:
    """A compiled chat template and the special tokens it may name (`bos_token`, `eos_token`, ...)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        # One moment for the whole process: prefixes rendered around midnight must still agree.
        now = datetime.now()
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = now.strftime
        self._special_tokens = dict(special_tokens)
        with _limited("does not compile"):
            self._template = environment.from_string(source)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text of a conversation; with the generation prompt it ends where the answer begins.

        @throws PrepareError if the template refuses the messages, fails or exceeds a limit
        """
        with _limited("refuses this conversation"):
            text = self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
                documents=None, **self._special_tokens)
        if len(text) > MAX_GROWTH * len(str(messages)) + MAX_ADDED_CHARACTERS:
            raise PrepareError(f"the model's chat template makes {len(text):,} characters of a conversation of "
                               f"{len(str(messages)):,}")
        return text
