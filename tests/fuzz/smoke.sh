#!/usr/bin/env bash
# Builds the fuzz targets into BUILD_DIR and runs them for SECONDS in all; a crash, leak or hang fails and leaves its
# input in BUILD_DIR/crashes. What a run learns stays in BUILD_DIR/corpus for the next one.
# usage: tests/fuzz/smoke.sh BUILD_DIR SECONDS      exit 77: nothing to run (no clang, no targets)
set -euo pipefail
cd "$(dirname "$0")/../.."

build_dir=$1 total_seconds=$2
sources=(tests/fuzz/fuzz_*.cpp)
if [[ ! -e ${sources[0]} ]] || ! command -v clang++-14 >/dev/null; then
  echo "skipped: needs clang++-14 and tests/fuzz/fuzz_*.cpp"
  exit 77
fi

cmake -S . -B "$build_dir" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_COMPILER=clang++-14 -DGRAFT_FUZZ=ON >/dev/null
cmake --build "$build_dir" --target fuzz
seconds_each=$((total_seconds / ${#sources[@]}))
mkdir -p "$build_dir/crashes"
for source in "${sources[@]}"; do
  name=$(basename "$source" .cpp)
  corpus=$build_dir/corpus/$name
  mkdir -p "$corpus"
  leaks=1
  [[ $name == fuzz_shard ]] && leaks=0  # libhdf5 itself loses some bytes for each file it refuses
  echo "== $name, $seconds_each s"
  "$build_dir/tests/fuzz/$name" -max_total_time="$seconds_each" -timeout=10 -rss_limit_mb=2048 -max_len=65536 \
    -detect_leaks="$leaks" \
    -verbosity=0 -print_final_stats=1 -artifact_prefix="$build_dir/crashes/$name-" "$corpus"
done
