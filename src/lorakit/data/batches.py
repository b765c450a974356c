"""Which examples come together, in which order, and how they become tensors.

B batch, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
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


def order(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, groups: Sequence[int] | None = None
) -> list[list[int]]:
    """Numbers of the examples of each batch of one epoch, each example once.

    Shuffled, then sorted by length inside windows of 50 batches so that a batch holds little padding; then the batches
    are shuffled. Examples of one group come one after another, up to half a batch, so that a batch has more than one.
    The same arguments give the same order everywhere.

    >>> sorted(number for batch in order([3, 1, 2, 3, 1], batch_size=2, seed=0, epoch=0) for number in batch)
    [0, 1, 2, 3, 4]
    >>> sorted(sorted(batch) for batch in order([3] * 4, batch_size=4, seed=0, epoch=0, groups=[0, 1, 1, 0]))
    [[0, 1, 2, 3]]
    """
    chance = random.Random(f"{seed} {epoch}")
    numbers = list(range(len(lengths)))
    chance.shuffle(numbers)
    batches = []
    for window in _windows(_units(numbers, groups, max(batch_size // 2, 1)), WINDOW_BATCHES * batch_size):
        near = sorted(window, key=lambda unit: max(lengths[number] for number in unit))
        line = [number for unit in near for number in sorted(unit, key=lambda number: lengths[number])]
        batches += [line[at : at + batch_size] for at in range(0, len(line), batch_size)]
    chance.shuffle(batches)
    return batches


def _units(numbers: Sequence[int], groups: Sequence[int] | None, most: int) -> list[list[int]]:
    """Numbers of one group together, at most so many, in the order of the first of each."""
    units: list[list[int]] = []
    growing: dict[int, list[int]] = {}
    for number in numbers:
        unit = [] if groups is None else growing.get(groups[number], [])
        if len(unit) in (0, most):
            unit = []
            units.append(unit)
            if groups is not None:
                growing[groups[number]] = unit
        unit.append(number)
    return units


def _windows(units: Sequence[list[int]], most: int) -> Iterator[list[list[int]]]:
    """Units, one after another, with at most so many examples together; a larger unit is one for itself."""
    window: list[list[int]] = []
    count = 0
    for unit in units:
        if window and count + len(unit) > most:
            yield window
            window, count = [], 0
        window.append(unit)
        count += len(unit)
    if window:
        yield window
