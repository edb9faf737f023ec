"""The tokenizer as a child process of `graft generate` and `graft merge`: one JSON object a line each way.

  {"op": "render", "messages": [...]}  -> {"ids": [...], "text": "..."}   ends with the generation prompt
  {"op": "encode", "text": "..."}      -> {"ids": [...]}                  with bos if the model expects it
  {"op": "decode", "ids": [...]}       -> {"text": "..."}                 "skip_special": true drops those
  {"op": "files"}                      -> {"files": {name: content}}     of a Hugging Face folder
  {"op": "info"}                       -> {"eos_ids", "vocab_size", "sha256", "has_chat_template"}

A request that fails is answered with {"error": "...", "exit_code": n}, and so is each one where the
model has no tokenizer that can be loaded; the process ends at end of input.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

from errors import BUG, PrepareError, run_reporting_errors
from tokenizer import Tokenizer, load_tokenizer


def answer(tokenizer: Tokenizer, request: Any) -> dict[str, Any]:
    """The reply to one request. @throws PrepareError, KeyError or TypeError if it is malformed"""
    op = request["op"]
    if op == "render":
        text = tokenizer.render(request["messages"], add_generation_prompt=True)
        return {"ids": tokenizer.encode(text), "text": text}
    if op == "encode":
        return {"ids": tokenizer.encode(request["text"], add_bos=tokenizer.add_bos)}
    if op == "decode":
        return {"text": tokenizer.decode(request["ids"], bool(request.get("skip_special", False)))}
    if op == "files":
        return {"files": tokenizer.files()}
    if op == "info":
        return {"eos_ids": tokenizer.eos_ids, "vocab_size": tokenizer.vocab_size,
                "sha256": tokenizer.sha256, "has_chat_template": tokenizer.chat_template is not None}
    raise PrepareError(f"unknown op {op!r}; known are render, encode, decode, files, info")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="GGUF file or Hugging Face directory")
    model, load = parser.parse_args().model, functools.cache(load_tokenizer)
    for line in sys.stdin.buffer:
        try:
            reply = answer(load(model), json.loads(line))
        except PrepareError as error:
            reply = {"error": str(error), "exit_code": error.exit_code}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            reply = {"error": f"malformed request: {type(error).__name__}: {error}", "exit_code": BUG}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    sys.exit(run_reporting_errors("tokenizer_pipe", main))
