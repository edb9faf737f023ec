"""Every method that HF PEFT has: what the program trains from the method's own start, PEFT loads without a word and
computes the same logits with. The fields are those of tests/oracle/peft_methods.py; the other direction, PEFT's files
in Graft, is tests/peft/peft_oracle_test.cpp."""

from __future__ import annotations

import concurrent.futures
import json
import os
import sys
import warnings

import peft
import pytest
import torch
from graft_cli import ORACLE, ROOT, graft, succeed, write_config
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "tests/oracle"))
import check_peft  # noqa: E402
import peft_methods  # noqa: E402

BASE = ORACLE / "qwen2"
TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order
OUR_NAME = {"LN_TUNING": "layernorm_tuning"}  # where it is not PEFT's
ELSEWHERE = {"progressbar", "use_dora", "total_step", "num_subspaces"}  # fields of PEFT's that are none here; dora is a method
# What PEFT says of itself, not of the files.
REMARKS = ["Unsupported layer type '<class 'transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm'>'",  # of LN_TUNING
           "Setting boft_n_butterfly_factor to 1",  # without CUDA
           "The cayley-neumann parameterization has been slightly changed",  # the file names no version of PEFT
           # Graft writes RandLoRA's shared matrices once, not for every slot again.
           r"Found missing adapter keys[^\[]*\[('[^']*\.randlora_[AB]\.default'(, )?)+\]",
           "save_precomputed_indices=False: sparse-support indices will be recomputed",  # as was asked for
           "Specified to not (save|load)"]  # what save_projection = false means

peft_methods.prepare_peft()


def method_of(case):
    if case.fields.get("use_dora"):
        return "dora"
    peft_type = case.config(**case.fields).peft_type.value
    return OUR_NAME.get(peft_type, peft_type.lower())


METHODS = {name: method_of(case) for name, case in peft_methods.CASES.items()}
FIRST = {method: name for name, method in reversed(METHODS.items())}
# One case of each method, and those whose file leaves to PEFT what matrices there are or how large they are.
CASES = [name for name, method in METHODS.items() if name == FIRST[method]
         or name.endswith(("patterns", "pattern", "no_projections", "indices", "lowest", "tied", "share"))]


def train(name, directory):
    case = peft_methods.CASES[name]
    fields = {key: value for key, value in case.fields.items() if key not in ELSEWHERE}
    return train_entry({"method": METHODS[name]} | fields, directory)


def train_entry(entry, directory):
    """Two steps from the method's own start, and the logits; the first command that fails, or the last."""
    path = write_config(directory / "run.yaml", BASE / "rows.h5", f'model.name_or_path="{BASE / "model"}"',
                        'model.quantization="none"', "data.packing=false", f"peft=[{json.dumps(entry)}]",
                        "train.max_steps=2", "train.gradient_accumulation_steps=1",
                        "train.per_device_train_batch_size=2", "train.learning_rate=0.03")
    done = graft("train", path)
    return graft("eval", path, "--logits", directory / "logits.safetensors") if done.returncode == 0 else done


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Name -> its directory and what came of it; a processor each, as a start takes longer than two steps."""
    known = {entry["name"] for entry in json.loads(succeed("methods", "--json").stdout)["methods"]}
    names = [name for name in CASES if METHODS[name] in known]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        directories = [tmp_path_factory.mktemp(name) for name in names]
        yield dict(zip(names, zip(directories, [pool.submit(train, *run) for run in zip(names, directories)])))


@pytest.fixture(scope="module")
def base():
    torch.set_num_threads(1)
    model = check_peft.load_base(BASE / "model")
    return model, {key: value.clone() for key, value in model.state_dict().items()}


def fresh(base):
    model, weights = base
    copy = type(model)(model.config)
    copy.load_state_dict(weights)
    return copy.eval()


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_graft_trained(name, runs, base):
    if name not in runs:
        pytest.skip(f"no method is PEFT's {METHODS[name]}")
    directory, run = runs[name]
    check(run.result(), directory, base)


def test_peft_loads_the_router_that_graft_trained(tmp_path, base):
    """PEFT 0.21.2 loses a layer of those it saves itself."""
    loras = [str(ORACLE / "xlora" / name) for name in ("lora_0", "lora_1")]
    entry = {"method": "xlora", "adapters": loras, "layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16}
    base[0].config.use_cache = False  # as PEFT wants it here
    check(train_entry(entry, tmp_path), tmp_path, base)


def check(done, directory, base):
    assert done.returncode == 0, done.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for remark in REMARKS:
            warnings.filterwarnings("ignore", message=remark)
        model = peft.PeftModel.from_pretrained(fresh(base), directory / "run/adapter").eval()
    rows = check_peft.read_rows(BASE / "rows.h5")
    theirs, untouched = check_peft.logits_of(model, rows), check_peft.logits_of(fresh(base), rows)
    saved = load_file(directory / "logits.safetensors")
    ours = [saved[f"row.{i}"] for i in range(len(rows))]
    size = max(logits.abs().max().item() for logits in theirs)
    assert check_peft.largest_difference(ours, theirs) < TOLERANCE * size
    assert check_peft.largest_difference(untouched, theirs) > 10 * TOLERANCE * size
