"""fish_mask through the program: the mask is chosen from the run's own rows, alike on any ranks, and kept by what goes on."""

from __future__ import annotations

import signal

import h5py
import numpy as np
from graft_cli import (MODEL, Job, adapter, assert_same_run, graft, lanes, succeed, write_config, write_rows)
from safetensors.torch import load_file

FISH = 'peft=[{"method": "fish_mask", "keep": 0.02, "num_samples": 5}]'
PREEMPTED, USAGE = 75, 2


def test_the_mask_is_the_same_on_any_ranks_and_survives_a_kill(long_run):
    """A resumed run takes its places from the checkpoint, a packed run looks at one document at a time."""
    reference = long_run(FISH, folder="reference")
    succeed("train", reference)
    path = long_run(FISH)
    run = path.parent / "run"
    with Job("train", path, lanes(2), ranks=2) as job:
        assert job.wait_for_step(run, 6)
        job.kill_ranks(signal.SIGUSR1)
        assert job.wait().returncode == PREEMPTED
    succeed("train", path)
    assert_same_run(run, reference.parent / "run")


def test_equal_documents_of_a_packed_row_count_one_by_one(tmp_path):
    """Eight equal ones in a row are eight times one's square: the mask is that of the same documents a row each."""
    write_rows(tmp_path / "rows.h5", [24, 24])
    with h5py.File(tmp_path / "rows.h5", "r+") as file:
        for name in "tokens", "loss_mask":
            first, second = np.split(file[name][:], 2)
            del file[name]
            file[name] = np.concatenate([first[9:12]] * 8 + [second[9:12]])  # behind what is no target
        del file["offsets"]
        file["offsets"] = np.arange(10, dtype=np.uint64) * 3
        file.attrs["num_samples"] = 9
    chosen = []
    for packing in "true", "false":
        path = write_config(tmp_path / f"{packing}.yaml", tmp_path / "rows.h5", FISH.replace("5}", "9}"),
                            f"data.packing={packing}", f'checkpoint.output_dir="{tmp_path / packing}"')
        succeed("train", path)
        tensors = load_file(tmp_path / packing / "adapter/adapter_model.safetensors")
        chosen.append({key: value for key, value in tensors.items() if key.endswith("fish_places")})
    assert chosen[0].keys() == chosen[1].keys()
    assert all((chosen[0][key] == chosen[1][key]).all() for key in chosen[0])


def test_what_is_trained_merges_and_starts_another_run(rows, tmp_path):
    path = write_config(tmp_path / "run.yaml", rows, FISH, 'model.quantization="none"')
    succeed("train", path)
    run = tmp_path / "run"
    succeed("eval", path, "--logits", tmp_path / "adapted.safetensors")
    succeed("merge", "--model", MODEL, "--adapter", run / "adapter", "--output", tmp_path / "merged")
    merged = write_config(tmp_path / "merged.yaml", rows, f'model.name_or_path="{tmp_path / "merged"}"', "peft=[]",
                          "data.train=[]", 'model.quantization="none"', f'checkpoint.output_dir="{tmp_path / "other"}"')
    succeed("eval", merged, "--logits", tmp_path / "merged.safetensors")
    adapted, alone = load_file(tmp_path / "adapted.safetensors"), load_file(tmp_path / "merged.safetensors")
    assert adapted.keys() == alone.keys()
    assert max((adapted[k] - alone[k]).abs().max() for k in adapted) < 1e-4

    again = write_config(tmp_path / "again.yaml", rows, f'peft=[{{"init_from": "{run / "adapter"}"}}]',
                         'model.quantization="none"', f'checkpoint.output_dir="{tmp_path / "again"}"')
    succeed("train", again)
    before, after = load_file(run / "adapter/adapter_model.safetensors"), load_file(
        tmp_path / "again/adapter/adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[k] == after[k]).all() for k in before if k.endswith("fish_places"))
    assert adapter(tmp_path / "again") != adapter(run)


def test_a_share_of_less_than_one_value_is_refused(rows, tmp_path):
    done = graft("train", write_config(tmp_path / "run.yaml", rows, 'peft=[{"method": "fish_mask", "keep": 1e-9}]'))
    assert done.returncode == USAGE and "values is less than one" in done.stderr
