"""Real text that any Debian machine has, as JSON Lines for `graft prepare`: three small tasks.

  python-docs           a function of the standard library -> the first line of its docstring  (chat)
  package-sections      the short description of a Debian package -> its section               (classification)
  character-categories  the name of a Unicode character -> its general category                (classification)

The same machine gives the same file: sorted by a hash of the text, each text once.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from errors import PrepareError, run_reporting_errors

Record = dict[str, Any]

NUM_CLASSES = 8
# No library of functions to be described: tests, fixtures, and what pip put there.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# A word like libfoo or python3-foo names the section of its package; library and liberal do not.
_REVEALING = re.compile(r"\b(?:lib(?!rar(?:y|ies)|er[at]|id)|(?:python3?|perl|golang|node|ruby|r-cran)-)(?=[a-z0-9])")
_CATEGORIES = {
    "Lu": "uppercase letter", "Ll": "lowercase letter", "Lo": "other letter", "Mn": "nonspacing mark",
    "So": "other symbol", "Sm": "math symbol", "No": "other number", "Nd": "decimal digit",
}
# Names that are made of the code point, such as CJK UNIFIED IDEOGRAPH-4E00.
_NUMBERED_NAME = re.compile(r"-[0-9A-F]{4,6}$|^HANGUL SYLLABLE ")


def python_docs() -> Iterator[Record]:
    """One conversation for each public function and method of the standard library with a docstring."""
    root = Path(sysconfig.get_path("stdlib"))
    chats: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS & set(folders):
            continue
        module = ".".join(part for part in folders if part != "__init__")
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes in old string literals
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates of other tools, not modules
        for question, answer in _functions(tree, module, ""):
            chats.setdefault(question, answer)
    for question in sorted(chats, key=_order):
        yield {"messages": [{"role": "user", "content": question},
                            {"role": "assistant", "content": chats[question]}]}


def _functions(node: ast.AST, module: str, prefix: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, module, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
            first_line = (ast.get_docstring(child) or "").partition("\n")[0].strip()
            if len(first_line) >= 10:
                signature = f"{module}.{prefix}{child.name}({ast.unparse(child.args)})"
                yield f"What does this Python function do?\n\n{signature}", first_line


def package_sections() -> Iterator[Record]:
    """Short descriptions of the packages that apt knows, with the most frequent sections as labels."""
    try:
        dump = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise PrepareError(f"apt-cache dumpavail failed ({error}); this corpus needs Debian or Ubuntu") from None
    sections: dict[str, set[str]] = defaultdict(set)
    for stanza in dump.decode("utf-8", "replace").split("\n\n"):
        fields = dict(re.findall(r"^(Section|Description(?:-en)?): (.*)$", stanza, re.MULTILINE))
        text = fields.get("Description") or fields.get("Description-en")
        if text and "Section" in fields:
            sections[_REVEALING.sub("", text).strip()].add(fields["Section"].rpartition("/")[2])
    labelled = ((text, next(iter(names))) for text, names in sections.items() if len(names) == 1)
    return _balanced(labelled, "run `apt-get update` first")


def character_categories() -> Iterator[Record]:
    """Names of Unicode characters with their general category."""
    named = ((name, unicodedata.category(chr(point))) for point in range(sys.maxunicode + 1)
             if (name := unicodedata.name(chr(point), "")) and not _NUMBERED_NAME.search(name))
    return _balanced(((name.lower(), _CATEGORIES[category]) for name, category in named
                      if category in _CATEGORIES), "this Python has no Unicode names")


def _balanced(labelled: Iterable[tuple[str, str]], advice: str) -> Iterator[Record]:
    """The NUM_CLASSES most frequent labels, each with as many texts as the rarest of them."""
    labels = dict(sorted(labelled, key=lambda pair: _order(pair[0])))
    top = Counter(labels.values()).most_common(NUM_CLASSES)
    if len(top) < NUM_CLASSES:
        raise PrepareError(f"found {len(top)} classes, expected {NUM_CLASSES}; {advice}")
    left = {label: top[-1][1] for label, _ in top}
    for text, label in labels.items():
        if left.get(label, 0) > 0:
            left[label] -= 1
            yield {"text": text, "label": label}


def _order(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


CORPORA = {"python-docs": python_docs, "package-sections": package_sections,
           "character-categories": character_categories}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", choices=CORPORA)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.output.with_name(f".{options.output.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            count = 0
            for count, record in enumerate(CORPORA[options.corpus](), 1):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(temporary, options.output)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{options.corpus}: {count:,} records in {options.output}")


if __name__ == "__main__":
    sys.exit(run_reporting_errors("corpora", main))
