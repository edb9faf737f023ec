#!/usr/bin/env bash
# clang-format and clang-tidy over the C++ files that this branch changed: since it left the main branch, or since the
# commit before when it is the main branch.
# usage: tests/tidy.sh [BUILD_DIR]      exit 77: nothing to compare with
set -euo pipefail
cd "$(dirname "$0")/.."

build_dir=${1:-build/release}
skip() { echo "skipped: $1"; exit 77; }
[[ -f $build_dir/compile_commands.json ]] || skip "no $build_dir/compile_commands.json; configure first"
command -v clang-tidy-14 >/dev/null || skip "no clang-tidy-14"
base=$(git merge-base HEAD origin/main 2>/dev/null || true)
if [[ -z $base || $base == "$(git rev-parse HEAD)" ]]; then
  base=$(git rev-parse --verify -q HEAD~) || skip "no earlier commit"
fi

mapfile -t changed < <(git diff --name-only --diff-filter=d "$base" -- '*.h' '*.cpp' '*.cu' '*.cuh')
((${#changed[@]})) || { echo "no C++ file changed since $base"; exit 0; }
clang-format-14 --dry-run -Werror "${changed[@]}"

sources=()
for file in "${changed[@]}"; do
  if [[ $file == *.cpp ]] && grep -qF "$PWD/$file" "$build_dir/compile_commands.json"; then sources+=("$file"); fi
done
((${#sources[@]})) || exit 0

# The commands are g++'s: clang reads the precompiled header as text, from a copy, and has no OpenMP.
commands=$(mktemp -d)
trap 'rm -rf "$commands"' EXIT
pch=$(sed -nE 's|.* ([^ ]+/cmake_pch\.hxx) .*|\1|p;' "$build_dir/compile_commands.json" | sort -u | head -n 1)
cp "$pch" "$commands/pch.hxx"
sed "s|-Winvalid-pch||g; s|-fopenmp||g; s|$pch|$commands/pch.hxx|g" "$build_dir/compile_commands.json" \
  >"$commands/compile_commands.json"
printf '%s\0' "${sources[@]}" |
  xargs -0 -n 1 -P "$(nproc)" clang-tidy-14 -p "$commands" --quiet --warnings-as-errors='*' \
    --extra-arg=-Wno-unknown-warning-option
