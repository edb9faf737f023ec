#!/usr/bin/env bash
# On a host with a GPU and nvcc: builds the CUDA back ends and runs every test that does not need the Python references,
# those labelled `cuda` among them. Arguments go to ctest, for example: tests/gpu.sh -L cuda
set -euo pipefail
cd "$(dirname "$0")/.."

nvidia-smi -L || { echo "no GPU here; tests/run.sh is for the CPU" >&2; exit 2; }
command -v nvcc >/dev/null || { echo "no nvcc in PATH; install the CUDA 13 toolkit" >&2; exit 2; }
cluster/install.sh build
cmake --preset cuda
cmake --build --preset cuda
exec ctest --preset cuda --label-exclude 'oracle|cli|slow' "$@"
