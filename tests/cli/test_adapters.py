"""Several frozen adapters: --adapter more than once and with weights, names that switch, and what is said of mistakes."""

from __future__ import annotations

import json

import pytest
from graft_cli import LENGTHS, MODEL, graft, succeed, write_config, write_rows

USAGE = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A config, and two adapters that were trained apart."""
    folder = tmp_path_factory.mktemp("adapters")
    write_rows(folder / "rows.h5", LENGTHS)
    path = write_config(folder / "run.yaml", folder / "rows.h5")
    for name, seed in (("a", 1), ("b", 2)):
        succeed("train", path, f"train.seed={seed}", f"checkpoint.output_dir={folder}/{name}")
    return path, folder / "a/adapter", folder / "b/adapter"


def loss(path, *arguments):
    return json.loads(succeed("eval", path, *arguments, "--json").stdout)["metrics"]["loss"]


def test_adapters_are_added_up_with_their_weights(trained):
    path, a, b = trained
    base, one, both = loss(path, "--base"), loss(path, "--adapter", a), loss(path, "--adapter", a, "--adapter", b)
    assert len({base, one, both}) == 3
    assert loss(path, "--adapter", f"{a}=1", "--adapter", f"{b}=0") == pytest.approx(one, rel=1e-6)
    assert loss(path, "--adapter", f"{a}=0.5", "--adapter", f"{a}=0.5") == pytest.approx(one, rel=1e-6)
    assert loss(path, "--adapter", f"{a}=1", "--adapter", f"{a}=-1") == pytest.approx(base, rel=1e-6)


def test_merged_and_converted_with_their_weights_they_compute_the_same(trained, tmp_path):
    path, a, b = trained
    chosen, plain = [f"{a}=0.5", f"{b}=2"], "model.quantization=none"
    expected = loss(path, plain, "--adapter", chosen[0], "--adapter", chosen[1])
    succeed("merge", "--model", MODEL, "--adapter", *chosen, "--output", tmp_path / "merged")
    merged = [f"model.name_or_path={tmp_path / 'merged'}", "peft=[]", "data.train=[]"]
    assert loss(path, plain, *merged) == pytest.approx(expected, rel=1e-5)
    succeed("export", "--model", MODEL, "--adapter", *chosen, "--as", "lora", "--to", "peft", "--output", tmp_path / "lora")
    assert loss(path, plain, "--adapter", tmp_path / "lora") == pytest.approx(expected, rel=1e-5)
    assert loss(path, plain, "--base") != pytest.approx(expected, rel=1e-3)


def test_the_config_names_weights_and_switches(trained):
    path, a, b = trained
    chosen = [f"model.adapters=[{a}, {b}]", "model.adapter_names=[first, second]", "peft=[]", "data.train=[]"]
    assert loss(path, *chosen, "model.active_adapters=[first]") == loss(path, "--adapter", a)
    assert loss(path, *chosen) == loss(path, "--adapter", a, "--adapter", b)
    assert loss(path, *chosen, "model.adapter_weights=[0.5, 0]") == pytest.approx(loss(path, "--adapter", f"{a}=0.5"), rel=1e-6)


def test_mistakes_are_told(trained):
    path, a, _ = trained
    done = graft("eval", path, "--adapter", f"{a}=much")
    assert done.returncode == USAGE and "'much' is no weight" in done.stderr
    done = graft("validate", path, f"model.adapters=[{a}]", "model.active_adapters=[third]")
    assert done.returncode == USAGE and f"no adapter is called 'third'; there are: {a}" in done.stderr
    done = graft("validate", path, f"model.adapters=[{a}]", "model.adapter_weights=[1, 2]")
    assert done.returncode == USAGE and "model.adapter_weights: needs one number for each" in done.stderr


def test_a_method_that_cannot_stand_on_another_is_refused_at_once(trained):
    path, *_ = trained
    lora, dora = {"method": "lora", "target_modules": ["attn.q"], "lora_bias": True}, {"method": "dora", "target_modules": ["attn.q"]}
    stacked = write_config(path.parent / "stacked.yaml", path.parent / "rows.h5", f"peft={json.dumps([lora, dora])}")
    done = graft("train", stacked, f"checkpoint.output_dir={path.parent}/stacked")
    assert done.returncode == USAGE and "dora needs the matrix of block.0.attn.q, and lora below it" in done.stderr


def test_the_lowest_layers_of_a_saved_adapter_can_be_left_out(trained, tmp_path):
    path = write_config(tmp_path / "drop.yaml", trained[0].parent / "rows.h5", 'peft=[{"method": "adapter_drop"}]')
    succeed("train", path)
    adapter = tmp_path / "run/adapter"

    def without(layers):
        entry = {"method": "adapter_drop", "init_from": str(adapter), "skip_layers": layers}
        return loss(path, f"peft={json.dumps([entry])}", f"checkpoint.output_dir={tmp_path}/none")

    assert without([]) == loss(path, "--adapter", adapter)
    assert without([0, 1]) == loss(path, "--base")
    assert len({without([]), without([0]), without([0, 1])}) == 3
