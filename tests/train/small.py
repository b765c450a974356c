"""A small training run: a tiny Llama, an adapter with dropout, random examples, and stand-ins for `lorakit.data`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import lorakit as lk
from lorakit.train import Feed, Train
from tests.tiny import tiny

SETTINGS = Train(steps=12, batch_size=3, accumulate=2, learning_rate=1e-2, seed=3, checkpoint_every=3)


@dataclass(frozen=True)
class Encoded:
    ids: tuple[int, ...]
    start: int
    label: int | None = None


@dataclass(frozen=True)
class Batch:
    ids_BT: Tensor
    attention_BT: Tensor
    labels_BT: Tensor
    classes_B: Tensor | None


def collate(examples: Sequence[Encoded], pad_id: int) -> Batch:
    ids = [torch.tensor(example.ids) for example in examples]
    labels = [torch.tensor([-100] * e.start + list(e.ids[e.start :])) for e in examples]
    classes = None if examples[0].label is None else torch.tensor([e.label for e in examples])
    return Batch(
        pad_sequence(ids, batch_first=True, padding_value=pad_id),
        pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=-100),
        classes,
    )


def order(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, groups: Sequence[int] | None = None
) -> list[list[int]]:
    numbers = list(range(len(lengths)))
    random.Random(f"{seed} {epoch}").shuffle(numbers)
    return [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]


def examples(count: int = 20, seed: int = 0, labels: int | None = None) -> list[Encoded]:
    drawn = random.Random(seed)
    found = []
    for _ in range(count):
        ids = tuple(drawn.randrange(3, 64) for _ in range(drawn.randrange(4, 12)))
        label = None if labels is None else drawn.randrange(labels)
        found.append(Encoded(ids, len(ids) if labels else drawn.randrange(2, len(ids)), label))
    return found


def feed(encoded: list[Encoded] | None = None) -> Feed:
    return Feed(examples() if encoded is None else encoded, 0, collate, order)


def adapted(family: str = "llama", name: str = "a", dropout: float = 0.1, **fields: Any) -> Any:
    torch.manual_seed(1)
    model = tiny(family, **fields)
    lk.attach(model, lk.LoRA(rank=2, dropout=dropout, targets=("attn.q", "attn.v")), name=name)
    return model
