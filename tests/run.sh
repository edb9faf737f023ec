#!/usr/bin/env bash
# All tests from a clean clone: set-up, build, then ctest with the Python and command-line checks in it.
#   tests/run.sh         everything
#   tests/run.sh fast    without what is labelled slow: under two minutes after a build
set -euo pipefail
cd "$(dirname "$0")/.."

skip=()
case ${1:-all} in
  all) ;;
  fast) skip=(--label-exclude slow) ;;
  *) echo "usage: tests/run.sh [fast]" >&2; exit 2 ;;
esac

cluster/install.sh test
cmake --preset release
cmake --build --preset release
exec ctest --preset release --parallel "$(nproc)" "${skip[@]}"
