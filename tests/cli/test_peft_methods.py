"""Every method that HF PEFT has: what the program trains from the method's own start, PEFT loads without a word and
computes the same logits with. The fields are those of tests/oracle/peft_methods.py and peft_prompts.py; the other direction, PEFT's files
in Graft, is tests/peft/peft_oracle_test.cpp."""

from __future__ import annotations

import concurrent.futures
import json
import os
import sys
import types
import warnings

import peft
import pytest
import torch
from graft_cli import ORACLE, ROOT, graft, succeed, write_config
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "tests/oracle"))
import check_peft  # noqa: E402
import peft_methods  # noqa: E402
import peft_prompts  # noqa: E402
from make_fixtures import copies_of  # noqa: E402

ROWS = ORACLE / "qwen2/rows.h5"
TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order
OUR_NAME = {"LN_TUNING": "layernorm_tuning", "ADAPTION_PROMPT": "llama_adapter"}  # where it is not PEFT's
ELSEWHERE = {"progressbar", "use_dora", "total_step"}  # fields of PEFT's that are none here; dora is a method
# What PEFT says of itself, not of the files.
REMARKS = ["Unsupported layer type '<class 'transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm'>'",  # of LN_TUNING
           "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",  # rows of tokens are tied
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
    if case.fields.get("kasa_config"):
        return "kasa"
    peft_type = case.config(**case.fields).peft_type.value
    return OUR_NAME.get(peft_type, peft_type.lower())


ALL = peft_methods.CASES | peft_prompts.CASES
METHODS = {name: method_of(case) for name, case in ALL.items()}
FIRST = {method: name for name, method in reversed(METHODS.items())}
# One case of each method, and those whose file leaves to PEFT what matrices there are or how large they are.
CASES = [name for name, method in METHODS.items() if name == FIRST[method] or name in peft_prompts.CASES
         or name.endswith(("patterns", "pattern", "no_projections", "indices", "lowest", "tied", "share"))]


def train(name, directory):
    fields = {key: value for key, value in ALL[name].fields.items() if key not in ELSEWHERE and value != "self_attn"}
    fields |= vars(fields.pop("kasa_config", types.SimpleNamespace()))
    return train_entry({"method": METHODS[name]} | fields, ORACLE / ALL[name].base, directory)


def train_entry(entry, base, directory):
    """Two steps from the method's own start, and the logits; the first command that fails, or the last."""
    path = write_config(directory / "run.yaml", ROWS, f'model.name_or_path="{base / "model"}"',
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


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_graft_trained(name, runs):
    if name not in runs:
        pytest.skip(f"no method is PEFT's {METHODS[name]}")
    directory, run = runs[name]
    folder = ORACLE / ALL[name].base
    check(run.result(), directory, copies_of(folder / "model"))


def test_peft_loads_the_router_that_graft_trained(tmp_path):
    """PEFT 0.21.2 loses a layer of those it saves itself."""
    loras = [str(ORACLE / "xlora" / name) for name in ("lora_0", "lora_1")]
    entry = {"method": "xlora", "adapters": loras, "layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16}
    folder = ORACLE / "qwen2"

    def base(copy=copies_of(folder / "model")):
        model = copy()
        model.config.use_cache = False  # as PEFT wants it here
        return model

    check(train_entry(entry, folder, tmp_path), tmp_path, base)


def check(done, directory, base):
    torch.set_num_threads(1)
    assert done.returncode == 0, done.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for remark in REMARKS:
            warnings.filterwarnings("ignore", message=remark)
        model = peft.PeftModel.from_pretrained(base(), directory / "run/adapter").eval()
    rows = check_peft.read_rows(ROWS)
    theirs, untouched = check_peft.logits_of(model, rows), check_peft.logits_of(base(), rows)
    saved = load_file(directory / "logits.safetensors")
    ours = [saved[f"row.{i}"] for i in range(len(rows))]
    size = max(logits.abs().max().item() for logits in theirs)
    assert check_peft.largest_difference(ours, theirs) < TOLERANCE * size
    assert check_peft.largest_difference(untouched, theirs) > 10 * TOLERANCE * size
