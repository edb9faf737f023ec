#!/usr/bin/env bash
# Compiles what a CPU build leaves out: the CUDA kernels and the NCCL communicator, for sm_90. Needs nvcc and the full
# LibTorch wheel, no GPU. exit 77: they are not here
set -euo pipefail
cd "$(dirname "$0")/.."

command -v nvcc >/dev/null || { echo "skipped: no nvcc"; exit 77; }
compgen -G ".venv/lib/python3*/site-packages/nvidia/nccl/include/nccl.h" >/dev/null || { echo "skipped: no NCCL"; exit 77; }
cmake --preset cuda -DGRAFT_TESTS=OFF >/dev/null
cmake --build --preset cuda --target graft_kernels graft_dist
