"""graft train on 1 to 4 ranks: the same bits at any rank count, the loss of Hugging Face, the bytes on the wire.

Oracles: transformers for the loss, and the layout of BlockStore and the reduction tree restated here for the traffic.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from graft_cli import LENGTHS, MODEL, VOCABULARY, adapter, losses, metrics, succeed, write_config, write_rows



@pytest.fixture
def train(tmp_path):
    """train(rows, ranks, override...) -> the folder of a finished run."""
    runs = 0

    def call(rows, ranks, *overrides):
        nonlocal runs
        runs += 1
        folder = tmp_path / f"run-{runs}"
        folder.mkdir()
        succeed("train", write_config(folder / "run.yaml", rows, *overrides), ranks=ranks)
        return folder / "run"
    return call


# --- the same bits at any rank count (promise 4) -----------------------------------------------------------------


@pytest.fixture
def same_bits(train, rows):
    """Trains with four lanes on 1, 2 and 4 ranks and compares adapters, losses and gradient norms."""
    def call(*overrides, lanes=4, rank_counts=(1, 2, 4)):
        one, *others = (train(rows, ranks, f"train.gradient_accumulation_steps={lanes // ranks}", *overrides)
                        for ranks in rank_counts)
        numbers = [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(one)]
        for other in others:
            assert [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(other)] == numbers
            assert adapter(other) == adapter(one)
        return one
    return call


def dropout_of(p):
    return 'peft=[{"method": "lora", "r": 4, "lora_dropout": %s, "target_modules": "all-linear"}]' % p


def test_packed_rows_give_equal_bits_on_1_2_and_4_ranks(same_bits):
    same_bits()


def test_padded_rows_with_dropout_and_recompute_give_equal_bits(same_bits):
    same_bits("data.packing=false", "train.gradient_checkpointing=true", dropout_of(0.1))


def test_an_epoch_that_ends_with_empty_lanes_gives_equal_bits(same_bits):
    """Seven documents, one a lane, on 3 ranks: the last step leaves two ranks without a token."""
    one = same_bits("train.max_steps=null", "train.num_train_epochs=1", "data.packing=false", lanes=3,
                    rank_counts=(1, 3))
    assert [line["tokens"] for line in metrics(one)][-1] == sum(LENGTHS)
    assert len(metrics(one)) == math.ceil(len(LENGTHS) / 3)


def test_how_memory_is_saved_does_not_change_the_bits(train, rows):
    plain = train(rows, 1, dropout_of(0.1))
    assert adapter(train(rows, 1, dropout_of(0.1), "train.gradient_checkpointing=true")) == adapter(plain)
    assert adapter(train(rows, 1, dropout_of(0.1), "parallel.lanes_per_gather=1")) == adapter(plain)
    assert adapter(train(rows, 2, dropout_of(0.1), "train.gradient_accumulation_steps=2",
                         'parallel.shard="replicate"')) == adapter(plain)


def test_dropout_and_seed_change_the_bits(train, rows):
    plain = adapter(train(rows, 1))
    assert adapter(train(rows, 1, dropout_of(0.1))) != plain
    assert adapter(train(rows, 1, "train.seed=43")) != plain


# --- the loss is that of all targets (promise 5) -----------------------------------------------------------------

def loss_of_hugging_face(documents, masks):
    """Mean over all targets of all documents, one document at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    total, targets = 0.0, 0
    for document, mask in zip(documents, masks, strict=True):
        ids = torch.tensor(document.astype(np.int64))
        with torch.no_grad():
            nll = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total += nll[torch.tensor(mask[1:]) == 1].double().sum().item()
        targets += int(mask[1:].sum())
    return total / targets


@pytest.mark.parametrize("packing, ranks, lanes, batch", [("true", 1, 8, 1), ("false", 1, 7, 1), ("false", 1, 1, 7),
                                                          ("true", 2, 4, 1), ("false", 3, 1, 3), ("true", 4, 1, 2)])
def test_loss_is_the_mean_over_all_targets(train, tmp_path, packing, ranks, lanes, batch):
    rows = tmp_path / "all.h5"
    expected = loss_of_hugging_face(*write_rows(rows, LENGTHS))
    run = train(rows, ranks, f"data.packing={packing}", f"train.gradient_accumulation_steps={lanes}",
                f"train.per_device_train_batch_size={batch}", "train.max_steps=1", 'model.quantization="none"')
    assert metrics(run)[0]["tokens"] == sum(LENGTHS)
    assert losses(run)[0] == pytest.approx(expected, rel=1e-5)


# --- the bytes on the wire (promise 1) ---------------------------------------------------------------------------

LAYERS, WIDTH, INNER, KEYS, RANK = 5, 64, 128, 32, 4


@pytest.fixture
def shape(tmp_path):
    """shape(tied) -> a model of random weights with more layers than the window of two holds."""
    def call(tied):
        path = tmp_path / "shape.yaml"
        path.write_text(f"""
model_type: llama
vocab_size: {VOCABULARY}
hidden_size: {WIDTH}
intermediate_size: {INNER}
num_hidden_layers: {LAYERS}
num_attention_heads: 4
num_key_value_heads: 2
max_position_embeddings: 64
rms_norm_eps: 1.0e-5
tie_word_embeddings: {str(tied).lower()}
""")
        return path
    return call


MATRICES = [(WIDTH, WIDTH), (KEYS, WIDTH), (KEYS, WIDTH), (WIDTH, WIDTH), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)]


def align(num_bytes, unit):
    return -(-num_bytes // unit) * unit


def nf4_bytes(numel):
    """Codes, a byte of scale per 64 numbers, a float32 per 256 scales and one offset."""
    scales = numel // 64
    return align(numel // 2, 64) + align(scales, 64) + 4 * -(-scales // 256) + 4


def received(payload, world):
    """What one rank receives when a block is gathered: all shards but its own."""
    return align(payload, 256 * world) // world * (world - 1)


LAYER = sum(align(nf4_bytes(rows * columns), 64) for rows, columns in MATRICES) + 2 * align(4 * WIDTH, 64)
TABLE = 4 * VOCABULARY * WIDTH
TRAINED = LAYERS * RANK * sum(rows + columns for rows, columns in MATRICES)


def bytes_per_step(run, key):
    return [line[key] for line in metrics(run)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_a_sweep_gathers_what_the_shard_table_says(train, rows, shape, ranks, tied):
    run = train(rows, ranks, f'model.name_or_path="{shape(tied)}"', 'model.weights="random"',
                "train.gradient_accumulation_steps=1")
    # Two layers stay in the window at each turn; an untied head and the embedding share one buffer and oust each other.
    layers = 2 * (LAYERS - 2) * received(LAYER, ranks)
    steady = layers + (0 if tied else 2 * received(TABLE, ranks))
    first = layers + 2 * received(LAYER, ranks) + received(4 * WIDTH, ranks) + (1 if tied else 2) * received(TABLE, ranks)
    assert bytes_per_step(run, "bytes_gathered") == [first, steady, steady, steady]
    whole_base = LAYERS * received(LAYER, ranks) + received(4 * WIDTH, ranks) + (1 if tied else 2) * received(TABLE, ranks)
    assert steady <= 2 * whole_base


def test_gathered_bytes_do_not_grow_with_accumulation(train, rows, shape):
    def gathered(*overrides):
        return bytes_per_step(train(rows, 2, f'model.name_or_path="{shape(True)}"', 'model.weights="random"', *overrides),
                              "bytes_gathered")
    one = gathered("train.gradient_accumulation_steps=1")
    assert gathered("train.gradient_accumulation_steps=8") == one
    steady = 2 * (LAYERS - 2) * received(LAYER, 2)
    assert gathered("train.gradient_accumulation_steps=8", "parallel.lanes_per_gather=2")[1:] == [4 * steady] * 3


@pytest.mark.parametrize("ranks, lanes, nodes", [(2, 1, 1), (4, 1, 1), (2, 4, 1), (2, 3, 2)])
def test_only_the_adapters_gradient_is_reduced_once_a_step(train, rows, shape, ranks, lanes, nodes):
    """Three lanes of six are two nodes of the tree: a pair and one more."""
    run = train(rows, ranks, f'model.name_or_path="{shape(True)}"', 'model.weights="random"',
                f"train.gradient_accumulation_steps={lanes}")
    chunk = 4 * -(-TRAINED // ranks)
    assert bytes_per_step(run, "bytes_reduced") == [(ranks - 1) * (nodes + 1) * chunk] * 4


def test_a_replicated_base_is_not_gathered(train, rows):
    run = train(rows, 2, 'parallel.shard="replicate"', "train.gradient_accumulation_steps=1")
    assert bytes_per_step(run, "bytes_gathered") == [0] * 4
