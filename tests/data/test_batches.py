"""Batches: every example once an epoch, the same order for the same seed, padding that nothing learns from."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from lorakit.data import Encoded, collate, order
from lorakit.errors import BadData

ENCODED = [
    Encoded((3, 4, 5, 6), start=2, label=1),
    Encoded((7, 8), start=1, label=0),
    Encoded((9, 9, 9), start=3, label=1),
]


def test_a_batch_holds_its_examples() -> None:
    batch = collate(ENCODED, pad_id=7)
    for row, example in enumerate(ENCODED):
        length = len(example.ids)
        assert batch.ids_BT[row, :length].tolist() == list(example.ids)
        assert batch.ids_BT[row, length:].tolist() == [7] * (4 - length)
        assert batch.attention_BT[row].tolist() == [1] * length + [0] * (4 - length)
        assert batch.labels_BT[row, example.start : length].tolist() == list(example.ids[example.start :])
    assert int((batch.labels_BT != -100).sum()) == sum(len(example.ids) - example.start for example in ENCODED)
    assert batch.classes_B is not None
    assert batch.classes_B.tolist() == [1, 0, 1]
    assert {tensor.dtype for tensor in (batch.ids_BT, batch.attention_BT, batch.labels_BT)} == {torch.int64}


def test_without_labels_there_are_no_classes() -> None:
    assert collate([Encoded((1, 2), start=1)], pad_id=0).classes_B is None
    with pytest.raises(BadData, match="at least one"):
        collate([], pad_id=0)


@pytest.mark.parametrize(("count", "size"), [(0, 4), (1, 4), (1000, 4), (1003, 8), (7, 100)])
def test_an_epoch_holds_every_example_once(count: int, size: int) -> None:
    lengths = random.Random(0).choices(range(1, 90), k=count)
    batches = order(lengths, size, seed=3, epoch=1)
    assert sorted(itertools.chain(*batches)) == list(range(count))
    assert sum(len(batch) < size for batch in batches) == (count % size > 0)
    assert all(len(batch) <= size for batch in batches)


def test_the_order_is_a_function_of_its_arguments() -> None:
    lengths = [5, 3, 8, 1] * 20
    state = random.getstate(), torch.get_rng_state()
    first = order(lengths, 4, seed=0, epoch=0)
    assert first == order(lengths, 4, seed=0, epoch=0)
    assert first != order(lengths, 4, seed=1, epoch=0)
    assert first != order(lengths, 4, seed=0, epoch=1)
    assert state[0] == random.getstate()
    assert torch.equal(state[1], torch.get_rng_state())


def test_a_batch_holds_little_padding() -> None:
    lengths = [int(random.Random(n).lognormvariate(3, 0.6)) + 1 for n in range(2000)]

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(lengths[number] for number in batch) for batch in batches)

    near = order(lengths, 8, seed=0, epoch=0)
    shuffled = random.Random(0).sample(range(2000), 2000)
    assert padded(near) < 1.1 * sum(lengths) < padded([shuffled[at : at + 8] for at in range(0, 2000, 8)])
