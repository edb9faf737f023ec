#!/usr/bin/env bash
# What only a GPU can show, from a bare host in under ten minutes: builds with CUDA, runs every test labelled `cuda` (each
# kernel and each method against the CPU; two and four NCCL ranks, which share a single GPU) and a short training run whose
# losses are held against the CPU's (tests/gpu_train.py). A table at the end; exit 1 if a row failed.
# Needs nvcc 13, LibTorch and the libraries of `cluster/install.sh build`, and a Python with h5py for the training data. What
# is there is used as it is: without a network nothing may be missing.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

export PATH=$PATH:/usr/local/cuda/bin
nvidia-smi -L || { echo "no GPU here; tests/run.sh is for the CPU, tests/cuda_build.sh compiles for a GPU" >&2; exit 2; }
command -v nvcc >/dev/null || { echo "no nvcc in PATH; install the CUDA 13 toolkit" >&2; exit 2; }

work=build/cuda/gpu
rm -rf "$work" && mkdir -p "$work"
table=() failed=0

row() {  # row NAME COMMAND...: one line of the table; the output in a log, shown at its end if the command fails
  local name=$1 log="$work/$1.log" start=$SECONDS verdict=ok
  shift
  echo "== $name"
  "$@" >"$log" 2>&1 </dev/null || { verdict=FAILED failed=1; tail -n 200 "$log"; }
  table+=("$(printf '%-10s %-6s %4d s  %s' "$name" "$verdict" $((SECONDS - start)) "$log")")
  [[ $verdict == ok ]]
}
finish() { printf '%s\n' "" "${table[@]}" "total $SECONDS s"; exit "$failed"; }

# Another compiler's warnings (-w) are no reason to end: CI judges them. Installs only if something is missing.
architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
configure() {
  local options=(-DGRAFT_TESTS=ON -DGRAFT_BENCH=OFF -DGRAFT_UNITY=OFF -DCMAKE_CUDA_ARCHITECTURES="$architecture"
    -DCMAKE_CXX_FLAGS=-w "-DCMAKE_CUDA_FLAGS=-w -Xcompiler=-w")
  cmake --preset cuda "${options[@]}" || { cluster/install.sh build && cmake --preset cuda "${options[@]}"; }
}
run_tests() {  # on a host with a GPU a test that skips itself has failed
  ctest --preset cuda --label-regex '^cuda$' --no-tests=error || return
  ! grep -qF '***Skipped' "$work/tests.log"
}
train() {
  local python
  for python in .venv/bin/python python3; do
    if "$python" -c "import h5py"; then GRAFT_BINARY_DIR=$PWD/build/cuda "$python" tests/gpu_train.py "$work/train"; return; fi
  done
  echo "no Python with h5py: cluster/install.sh run" >&2
  return 1
}

row configure configure || finish
row build cmake --build --preset cuda --target graft cuda_twins_test cuda_contract_test dist_nccl_test || finish
row tests run_tests
grep -E 'Test +#.*(Passed|Failed|Skipped|Timeout)' "$work/tests.log"
row train train && cat "$work/train.log"
finish
