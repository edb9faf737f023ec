#!/usr/bin/env bash
# Compiles, for sm_90, what a CPU build leaves out: the CUDA kernels, the NCCL communicator, every file with a CUDA branch
# and the tests labelled `cuda`; links the tests of kernels and of NCCL, and loads them. Needs nvcc and the full LibTorch
# wheel, no GPU. exit 77: they are not here
set -euo pipefail
cd "$(dirname "$0")/.."

command -v nvcc >/dev/null || { echo "skipped: no nvcc"; exit 77; }
compgen -G ".venv/lib/python3*/site-packages/nvidia/nccl/include/nccl.h" >/dev/null || { echo "skipped: no NCCL"; exit 77; }

# Single objects of the launcher, not its library: the rest of it, and all it depends on, has no CUDA branch.
cmake --preset cuda -DGRAFT_TESTS=ON -DGRAFT_BENCH=OFF -DGRAFT_UNITY=OFF >/dev/null
objects=(tests/peft/CMakeFiles/cuda_contract_test.dir/cuda_contract_test.cpp.o)
for file in $(grep -rl GRAFT_WITH_CUDA --include='*.cpp' launcher); do
  objects+=("launcher/CMakeFiles/graft_launcher.dir/${file#launcher/}.o")
done
cmake --build --preset cuda --target cuda_twins_test dist_nccl_test "${objects[@]}"

# Without a GPU all of its tests skip themselves: it has loaded, so no symbol is missing.
build/cuda/tests/kernels/cuda_twins_test --gtest_brief=1
