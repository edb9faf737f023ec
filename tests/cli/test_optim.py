"""train.optim: a run of each optimiser goes on from its checkpoint, also on other ranks, to the bits of the run that was
not interrupted; another optimiser is not resumed."""

from __future__ import annotations

import json

import pytest
from graft_cli import LENGTHS, adapter, checkpoints, graft, losses, succeed, write_config, write_rows
from safetensors import safe_open

OPTIMS = ["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "sgd", "lion"]
LORA = 'peft=[{"method": "lora", "r": 48, "target_modules": ["attn.q", "mlp.up", "mlp.down"]}]'  # B of attn.q has more than 4096 elements


@pytest.fixture
def config(tmp_path):
    write_rows(tmp_path / "rows.h5", LENGTHS)

    def call(folder, *overrides):
        (tmp_path / folder).mkdir()
        return write_config(tmp_path / folder / "run.yaml", tmp_path / "rows.h5", LORA, *overrides)
    return call


@pytest.mark.parametrize("optim", OPTIMS)
def test_a_run_goes_on_on_other_ranks_to_the_same_bits(config, optim):
    chosen = f"train.optim={json.dumps(optim)}"
    whole, stopped = config("whole", chosen), config("stopped", chosen)
    succeed("train", whole, "train.max_steps=6")
    succeed("train", stopped, "train.max_steps=2")
    succeed("train", stopped, "train.max_steps=4", ranks=2)
    succeed("train", stopped, "train.max_steps=6", ranks=4)
    assert adapter(stopped.parent / "run") == adapter(whole.parent / "run")
    assert losses(whole.parent / "run")[-1] < losses(whole.parent / "run")[0]


def test_the_state_is_in_8_bits_and_another_optimiser_is_refused(config):
    path = config("run8", 'train.optim="paged_adamw_8bit"')
    succeed("train", path)
    with safe_open(checkpoints(path.parent / "run")[-1] / "state-0-of-1.safetensors", "np") as state:
        kinds = {key.split("/")[0]: state.get_slice(key).get_dtype() for key in state.keys() if "attn.q.lora_b" in key}
    assert kinds == {"exp_avg": "U8", "exp_avg_absmax": "F32", "exp_avg_sq": "U8", "exp_avg_sq_absmax": "F32"}
    done = graft("train", path, "train.optim=adamw", "train.max_steps=5")
    assert done.returncode == 2 and "train.optim: paged_adamw_8bit -> adamw" in done.stderr
