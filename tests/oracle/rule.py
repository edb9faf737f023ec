"""What every oracle's numbers are made of: values from names, and the two rows of tokens with their labels."""

import numpy as np
import torch

ROWS, LENGTH, VOCABULARY = 2, 24, 128


def fill(name, shape, scale):
    """Numbers in [-scale, scale) from a linear congruential generator seeded with the FNV-1a hash of the name."""
    state = 2166136261
    for byte in name.encode():
        state = ((state ^ byte) * 16777619) & 0xFFFFFFFF
    values = np.empty(int(np.prod(shape)), np.float32)
    for i in range(values.size):
        state = (1664525 * state + 1013904223) & 0xFFFFFFFF
        values[i] = ((state >> 8) / 16777216.0 - 0.5) * 2.0 * scale
    return torch.from_numpy(values.reshape(tuple(shape)))


def rows_and_labels():
    index = torch.arange(LENGTH)
    input_ids = torch.stack([(11 + 37 * index) % VOCABULARY, (5 + 53 * index) % VOCABULARY])
    labels = input_ids.clone()
    labels[0, :6] = -100
    labels[1, :1] = -100  # nothing predicts the first token
    labels[1, 10:13] = -100
    return input_ids, labels


def loss_of(logits, labels):
    """The mean over the targets, as every causal LM has it."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
