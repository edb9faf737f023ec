"""graft fuse: two adapters trained on rows of their own as one LoRA that PEFT reads."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from graft_cli import graft, succeed, write_config, write_rows
from safetensors.numpy import load_file

PEFT = 'peft=[{"method": "lora", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"}]'


@pytest.fixture(scope="module")
def concepts(tmp_path_factory):
    """(config, [(adapter, rows)]) of two LoRAs, each trained on two documents."""
    folder = tmp_path_factory.mktemp("fuse")
    trained = []
    for seed in (1, 2):
        (folder / str(seed)).mkdir()
        rows = folder / str(seed) / "rows.h5"
        write_rows(rows, [10, 9], seed=seed)
        succeed("train", write_config(folder / str(seed) / "run.yaml", rows, PEFT, "train.max_steps=20",
                                      'model.quantization="none"'))
        trained.append((folder / str(seed) / "run/adapter", rows))
    config = write_config(folder / "base.yaml", trained[0][1], 'model.quantization="none"')
    return config, trained


def fuse(config, trained, output, rank, *flags, ranks=1):
    said = succeed("fuse", config, "--adapter", *(a for a, _ in trained), "--data", *(d for _, d in trained), "--rank", rank,
                   "--output", output, *flags, ranks=ranks).stdout
    return [float(share) for share in re.findall(r"([0-9.]+) %", said)]


def loss(config, adapter, rows):
    which = ["--base"] if adapter == "base" else ["--adapter", adapter]
    done = succeed("eval", config, f'data.eval=["{rows}"]', *which, "--json")
    return json.loads(done.stdout)["metrics"]["loss"]


def test_one_adapter_fused_is_itself(concepts, tmp_path):
    config, trained = concepts
    lost, _ = fuse(config, trained[:1], tmp_path / "out", 2, "--epsilon", 1e-9)
    assert lost < 1e-2
    adapter, rows = trained[0]
    assert loss(config, tmp_path / "out", rows) == pytest.approx(loss(config, adapter, rows), abs=2e-3)


def test_two_adapters_keep_what_they_learnt_on_their_rows(concepts, tmp_path):
    config, trained = concepts
    lost, averaged = fuse(config, trained, tmp_path / "out", 16)
    assert lost < 0.5 * averaged
    for adapter, rows in trained:
        before, alone, fused = (loss(config, a, rows) for a in ("base", adapter, tmp_path / "out"))
        assert alone < before and fused < (before + alone) / 2
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (written["peft_type"], written["r"]) == ("LORA", 16)


def test_ranks_share_the_rows_and_agree(concepts, tmp_path):
    config, trained = concepts
    for ranks in (1, 2):
        fuse(config, trained, tmp_path / str(ranks), 4, "--epsilon", 0.01, ranks=ranks)
    one, two = (load_file(tmp_path / str(ranks) / "adapter_model.safetensors") for ranks in (1, 2))
    for module in {name.rsplit(".lora_", 1)[0] for name in one}:
        products = [t[f"{module}.lora_B.weight"] @ t[f"{module}.lora_A.weight"] for t in (one, two)]
        np.testing.assert_allclose(*products, rtol=0, atol=1e-3 * abs(products[0]).max(), err_msg=module)


def test_what_cannot_be_fused_is_said_before_the_base_is_read(concepts, tmp_path):
    config, trained = concepts
    arguments = ["fuse", config, "--adapter", trained[0][0], "--output", tmp_path / "out"]
    done = graft(*arguments, "--data", trained[0][1], trained[1][1], "--rank", 2)
    assert done.returncode == 2 and "1 adapters and data for 2" in done.stderr
    done = graft(*arguments, "--data", trained[0][1], "--rank", 4096)
    assert done.returncode == 2 and "--rank 4096 is larger than block.0.attn.q" in done.stderr
    assert not (tmp_path / "out").exists()
