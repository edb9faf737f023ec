#!/usr/bin/env bash
# mpirun with what Graft's ranks need on one machine: all cores (not one a rank), root in containers, more ranks than
# cores, and NCCL with several ranks on one GPU.
# usage: cluster/mpirun.sh -np 2 [mpirun option...] build/release/graft train CONFIG.yaml
set -euo pipefail

# One process a rank, seen by NCCL as a host of its own when ranks share a GPU: it refuses a device twice on one host.
if [[ ${1:-} == --as-rank ]]; then
  export NCCL_HOSTID=host$OMPI_COMM_WORLD_RANK NCCL_SOCKET_IFNAME=lo
  exec "${@:2}"
fi

options=() num_ranks=1
while [[ ${1:-} == -* ]]; do
  case $1 in
    -np | -n) num_ranks=${2:?ranks expected after $1} ;;
    --hostfile | --host | -x | --map-by) ;;
    *) echo "cluster/mpirun.sh: unknown option $1; it takes -np, --host, --hostfile, --map-by and -x" >&2; exit 2 ;;
  esac
  options+=("$1" "${2:?value expected after $1}")
  shift 2
done
if (($# == 0)); then sed -n '2,4s/^# //p' "$0" >&2; exit 2; fi

num_gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
command=("$@")
if [[ " ${options[*]} " != *" --host"* ]] && ((num_gpus > 0 && num_ranks > num_gpus)); then
  command=("$0" --as-rank "$@")
fi
if ((EUID == 0)); then options+=(--allow-run-as-root); fi
exec mpirun --oversubscribe --bind-to none "${options[@]}" "${command[@]}"
