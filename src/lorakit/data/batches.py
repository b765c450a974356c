"""Which examples come together, in which order, and how they become tensors.

B batch, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.positions import UNLABELLED
from lorakit.data.tokens import Encoded
from lorakit.errors import BadData

WINDOW_BATCHES = 50


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Examples padded on the right; labels stand where their tokens stand (they are not shifted)."""

    ids_BT: Tensor  # int64
    attention_BT: Tensor  # int64, 1 where there is a token
    labels_BT: Tensor  # int64, UNLABELLED where nothing is to be learned
    classes_B: Tensor | None  # int64, for classification


def collate(encoded: Sequence[Encoded], pad_id: int) -> Batch:
    """Put examples into one batch.

    >>> collate([Encoded((5, 6, 7), start=2), Encoded((8, 9), start=1)], pad_id=0).labels_BT
    tensor([[-100, -100,    7],
            [-100,    9, -100]])
    """
    if not encoded:
        raise BadData("a batch needs at least one example")
    shape = (len(encoded), max(len(example.ids) for example in encoded))
    ids_BT = torch.full(shape, pad_id)
    attention_BT = torch.zeros(shape, dtype=torch.int64)
    labels_BT = torch.full(shape, UNLABELLED)
    for row, example in enumerate(encoded):
        ids = torch.tensor(example.ids)
        ids_BT[row, : len(ids)] = ids
        attention_BT[row, : len(ids)] = 1
        labels_BT[row, example.start : len(ids)] = ids[example.start :]
    classes = [example.label for example in encoded]
    return Batch(ids_BT, attention_BT, labels_BT, None if None in classes else torch.tensor(classes))


def order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Numbers of the examples of each batch of one epoch, each example once.

    Shuffled, then sorted by length inside windows of 50 batches so that a batch holds little padding; then the batches
    are shuffled. The same arguments give the same order on every machine.

    >>> sorted(number for batch in order([3, 1, 2, 3, 1], batch_size=2, seed=0, epoch=0) for number in batch)
    [0, 1, 2, 3, 4]
    """
    chance = random.Random(f"{seed} {epoch}")
    numbers = list(range(len(lengths)))
    chance.shuffle(numbers)
    window = WINDOW_BATCHES * batch_size
    batches = []
    for start in range(0, len(numbers), window):
        near = sorted(numbers[start : start + window], key=lambda number: lengths[number])
        batches += [near[at : at + batch_size] for at in range(0, len(near), batch_size)]
    chance.shuffle(batches)
    return batches
