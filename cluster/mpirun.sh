#!/usr/bin/env bash
# mpirun with what Graft's ranks need on one machine: all cores (not one a rank), root in containers, and more ranks than
# cores. Ends with 5 when a rank is killed, which mpirun alone would report as 137.
# usage: cluster/mpirun.sh -np 2 [mpirun option...] build/release/graft train CONFIG.yaml
set -euo pipefail

options=()
while [[ ${1:-} == -* ]]; do
  case $1 in
    -np | -n | --hostfile | --host | -x | --map-by) ;;
    *) echo "cluster/mpirun.sh: unknown option $1; it takes -np, --host, --hostfile, --map-by and -x" >&2; exit 2 ;;
  esac
  options+=("$1" "${2:?value expected after $1}")
  shift 2
done
if (($# == 0)); then sed -n '2,4s/^# //p' "$0" >&2; exit 2; fi

if ((EUID == 0)); then options+=(--allow-run-as-root); fi

# mpirun answers TERM and Ctrl-C by killing the ranks within a second; USR1 it passes on, and a training run then ends with
# a checkpoint and 75. So the first request to stop becomes USR1; the second is meant. In a session of its own mpirun does
# not get the terminal's Ctrl-C beside ours.
setsid mpirun --oversubscribe --bind-to none "${options[@]}" "$@" <&0 &
mpirun_pid=$!
next=USR1
stop() { interrupted=1; kill -"$next" "$mpirun_pid" 2>/dev/null || true; next=TERM; }
trap stop INT TERM
for signal in USR1 USR2; do trap "interrupted=1; kill -$signal $mpirun_pid 2>/dev/null || true" "$signal"; done
interrupted=1
while ((interrupted)); do # such a signal ends wait, not mpirun
  interrupted=0 status=0
  wait "$mpirun_pid" || status=$?
done
if ((status > 128)) && [[ $next == TERM ]]; then exit 130; fi # it was asked to
if ((status > 128)); then
  echo "error: a rank was ended by signal $((status - 128)) (mpirun names it above); 9 is often the kernel, out of memory" >&2
  exit 5
fi
exit "$status"
