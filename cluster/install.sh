#!/usr/bin/env bash
# Brings a machine to where Graft builds. Safe to repeat: nothing missing means nothing done, without a network.
#   cluster/install.sh build   compilers, libraries and LibTorch
#   cluster/install.sh run     the same, and what preparing data needs
#   cluster/install.sh test    the same, and the reference libraries of the tests
# Debian 12 and Ubuntu 24.04. Exit 2: system packages are missing and only root can install them.
set -euo pipefail
cd "$(dirname "$0")/.."

set_name=${1:-run}
case $set_name in
  build | run | test) ;;
  *) echo "usage: cluster/install.sh [build|run|test]" >&2; exit 2 ;;
esac

# Package, then what proves that it is there by whatever way it came: a command, a header or a library.
packages="
g++               command  g++
cmake             command  cmake
ninja-build       command  ninja
ccache            command  ccache
mold              command  mold
python3-venv      venv     -
openmpi-bin       command  mpirun
libopenmpi-dev    command  mpicc
libyaml-cpp-dev   header   yaml-cpp/yaml.h
libhdf5-dev       header   hdf5/serial/hdf5.h
zlib1g-dev        header   zlib.h
libcli11-dev      header   CLI/CLI.hpp
libspdlog-dev     header   spdlog/spdlog.h
nlohmann-json3-dev header nlohmann/json.hpp
libxxhash-dev     header   xxhash.h
libgtest-dev      header   gtest/gtest.h
libgmock-dev      header   gmock/gmock.h
libbenchmark-dev  header   benchmark/benchmark.h
"
test_packages="
hdf5-tools        command  h5dump
clang-14          command  clang++-14
clang-tidy-14     command  clang-tidy-14
clang-format-14   command  clang-format-14
libclang-rt-14-dev library libclang_rt.fuzzer-x86_64.a
"
# Enough to build, link and run on a CPU: libtorch_cpu needs just these two of torch's dependencies.
torch_pin=torch==2.11.0
torch_cpu=("$torch_pin" nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85)

step() {  # step NAME COMMAND...: one line, with the seconds it took; the command's own output only if it fails
  local name=$1 start=$SECONDS output status=0
  shift
  printf '%-58s' "$name"
  output=$("$@" 2>&1) || status=$?
  if ((status)); then
    printf 'failed after %d s\n%s\n' $((SECONDS - start)) "$output" >&2
    return "$status"
  fi
  printf '%4d s\n' $((SECONDS - start))
}

# python_missing PYTHON NAME==VERSION...: prints those that this Python has not. A borrowed Python (make_venv) keeps its
# own versions of all but torch.
python_missing() {
  "$1" - "${@:2}" <<'PYTHON'
import importlib.metadata, os, sys
borrowed = not os.path.exists(".venv/pyvenv.cfg")
for requirement in sys.argv[1:]:
    name, version = requirement.split("==")
    try:
        found = importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != version and not (found and borrowed and name != "torch"):
        print(requirement)
PYTHON
}

has_torch() { local missing; missing=$(python_missing "$1" "$torch_pin") && [[ -z $missing ]]; }

has() {  # has KIND THING
  local root
  case $1 in
    command) command -v "$2" ;;
    header)
      for root in /usr/include /usr/local/include /usr/include/x86_64-linux-gnu; do
        [[ -e $root/$2 ]] && return
      done
      return 1 ;;
    library) compgen -G "/usr/lib/llvm-14/lib/clang/*/lib/linux/$2" ;;
    venv) [[ -x .venv/bin/python ]] || python3 -c "import ensurepip" || has_torch python3 ;;
  esac
} >/dev/null 2>&1

apt_install() {
  export DEBIAN_FRONTEND=noninteractive
  apt-get -o Acquire::Retries=3 update -q
  apt-get -o Acquire::Retries=3 install -q -y --no-install-recommends "$@"
}

system_packages() {
  local wanted=$packages missing=() package kind thing
  [[ $set_name == test ]] && wanted+=$test_packages
  while read -r package kind thing; do
    if [[ -n $package ]] && ! has "$kind" "$thing"; then missing+=("$package"); fi
  done <<<"$wanted"
  ((${#missing[@]})) || return 0
  if ((EUID != 0)); then
    echo "Missing system packages. As root, run this line, then start again:" >&2
    echo "  apt-get update && apt-get install -y --no-install-recommends ${missing[*]}" >&2
    exit 2
  fi
  step "system packages: ${#missing[@]} missing" apt_install "${missing[@]}"
}

# A host whose own python3 holds the pinned torch (a GPU image) keeps it: .venv/bin/python then just calls it.
make_venv() {
  [[ -x .venv/bin/python ]] && return
  local host_python
  host_python=$(command -v python3)
  if has_torch "$host_python"; then
    mkdir -p .venv/bin
    printf '#!/bin/sh\nexec %q "$@"\n' "$host_python" >.venv/bin/python
    chmod +x .venv/bin/python
  else
    step "python environment .venv" python3 -m venv .venv
  fi
}

pip_install() {
  .venv/bin/python -m pip install -q --no-input --disable-pip-version-check --retries 5 "$@"
}

install_torch() {
  has_torch .venv/bin/python && return
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    step "LibTorch with its CUDA libraries (4.7 GB)" pip_install "$torch_pin"
  else
    step "LibTorch for a CPU (1.3 GB)" pip_install --no-deps "${torch_cpu[@]}"
  fi
}

install_set() {  # install_set TITLE FILE [pip option...]: what FILE pins and the environment lacks
  local pins missing
  mapfile -t pins < <(grep -hoE '^[A-Za-z0-9_.-]+==[^ ;#]+' "$2")
  mapfile -t missing < <(python_missing .venv/bin/python "${pins[@]}")
  ((${#missing[@]} == 0)) || step "$1" pip_install "${@:3}" "${missing[@]}"
}

install_adapters() {  # in a folder of its own, which tests/oracle/make_fixtures.py puts in front of the path
  local folder=.venv/adapters pins
  mapfile -t pins < <(grep -hoE '^[A-Za-z0-9_.-]+==[^ ;#]+' "$1")
  [[ -f $folder/installed && $(<"$folder/installed") == "${pins[*]}" ]] && return
  rm -rf "$folder"
  step "AdapterHub's adapters, with its transformers" pip_install --no-deps --target "$folder" "${pins[@]}"
  echo "${pins[*]}" >"$folder/installed"
}

python_packages() {
  local run_set=cluster/requirements-run.txt test_set=cluster/requirements-test.txt
  local adapters_set=cluster/requirements-adapters.txt stamp hash
  stamp=.venv/installed-$set_name
  hash=$(cat cluster/install.sh $run_set $test_set $adapters_set | sha256sum)
  [[ -f $stamp && $(<"$stamp") == "$hash" ]] && return
  make_venv
  install_torch
  if [[ $set_name != build ]]; then install_set "data tools and the embedded model" $run_set --no-deps; fi
  if [[ $set_name == test ]]; then
    install_set "reference libraries (3.5 GB)" $test_set -c $run_set
    install_adapters $adapters_set
  fi
  echo "$hash" >"$stamp"
}

system_packages
python_packages
