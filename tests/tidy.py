"""clang-format over every C++ file, clang-tidy over every source of the program, a folder at a time: one translation unit
for all files of a folder, so that LibTorch's headers are read once for it (the whole tree in minutes, not an hour). Of the
tests those are checked that changed since the branch left the main branch, or in the last commit of the main branch.

usage: tests/tidy.py [BUILD_DIR]      exit 77: no clang-tidy, or nothing was configured
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("configs", "kernels", "dist", "data", "models", "peft", "launcher")


def skip(why: str) -> None:
    print(f"skipped: {why}")
    sys.exit(77)


def git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
    return done.stdout.split()


def changed_tests() -> set[Path]:
    base = git("merge-base", "HEAD", "origin/main")
    if not base or base == git("rev-parse", "HEAD"):
        base = git("rev-parse", "--verify", "-q", "HEAD~")
    names = git("diff", "--name-only", "--diff-filter=d", base[0], "--", "tests/*.cpp") if base else []
    return {ROOT / name for name in names}


def sources_of(entry: dict) -> list[Path]:
    """The file of a command, or what a unity batch of CMake's includes."""
    file = Path(entry["file"])
    if "Unity" not in file.parts:
        return [file]
    return [Path(name) for name in re.findall(r'#include "(.+)"', file.read_text())]


def clang_command(entry: dict) -> tuple[str, ...]:
    """The command of g++ without its file, for clang: it reads the precompiled header as text and has no OpenMP."""
    words = [word for word in shlex.split(entry["command"])[1:] if word not in ("-fopenmp", "-Winvalid-pch", "-c")]
    if "ccache" in entry["command"].split()[0]:
        words = words[1:]
    for flag in ("-o", "-MF", "-MT"):
        if flag in words:
            del words[words.index(flag):words.index(flag) + 2]
    return tuple(word for word in words if word not in (entry["file"], "-MD"))


def check(folder: Path, number: int, command: tuple[str, ...], sources: list[Path]) -> str:
    """What clang-tidy has to say; empty if nothing."""
    unit = folder / f"{number}.cpp"
    unit.write_text("".join(f'#include "{source}"\n' for source in sorted(sources)))
    words = []
    for word in command:
        if word.endswith("cmake_pch.hxx"):
            copy = folder / f"{number}-pch.hxx"
            shutil.copy(word, copy)
            word = str(copy)
        words.append(word)
    done = subprocess.run(
        ["clang-tidy-14", "--quiet", f"--config-file={ROOT}/.clang-tidy", "--checks=-bugprone-suspicious-include",
         "--warnings-as-errors=*", f"--header-filter=^{ROOT}/({'|'.join(ROOMS)}|tests)/", str(unit), "--", *words,
         "-Wno-unknown-warning-option"], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode else ""


def main() -> None:
    build = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build/release")
    if shutil.which("clang-tidy-14") is None:
        skip("no clang-tidy-14")
    if not (build / "compile_commands.json").exists():
        skip(f"no {build}/compile_commands.json; configure first")
    files = [ROOT / name for name in git("ls-files", "*.h", "*.cpp", "*.cu", "*.cuh")]
    subprocess.run(["clang-format-14", "--dry-run", "-Werror", *(f for f in files if f.exists())], check=True)

    tests, groups = changed_tests(), {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        for source in sources_of(entry):
            room = source.relative_to(ROOT).parts[0] if source.is_relative_to(ROOT) else ""
            if room in ROOMS:
                groups.setdefault((room, clang_command(entry)), set()).add(source)
            elif source in tests:
                groups[(str(source), clang_command(entry))] = {source}
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = [pool.submit(check, Path(folder), number, command, sorted(sources))
                  for number, ((_, command), sources) in enumerate(groups.items())]
        complaints = [found for done in checks if (found := done.result())]
    print("\n".join(complaints) or f"{len(files)} files formatted, {sum(map(len, groups.values()))} sources clean")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
