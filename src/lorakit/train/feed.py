"""What a run reads: encoded examples, the order they come in, and how some of them become a batch.

B batch, T tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lorakit.errors import BadData
from lorakit.train.settings import Train

Numbers = list[list[int]]  # of the examples of each batch of a step


class Encoded(Protocol):
    """One example as token ids; those from `start` on are to be learned."""

    ids: Sequence[int]
    start: int
    label: int | None


class Batch(Protocol):
    """Examples padded on the right."""

    ids_BT: Tensor
    attention_BT: Tensor  # 1 where there is a token, 0 where there is padding
    labels_BT: Tensor  # the ids to be learned, not shifted; UNLABELLED elsewhere
    classes_B: Tensor | None


@dataclass(frozen=True, slots=True)
class Feed:
    """Encoded examples, how they are ordered and how they are put together.

    `order(lengths, batch_size, seed, epoch, groups)` gives the examples' numbers batch by batch, those of one group
    together; `collate(examples, pad_id)` makes a batch of rows; `lorakit.data.batches` has both.
    """

    examples: Sequence[Any]  # Encoded
    pad_id: int
    collate: Callable[[Sequence[Any], int], Any]  # -> Batch
    order: Callable[[Sequence[int], int, int, int, Sequence[int] | None], list[list[int]]]

    def __post_init__(self) -> None:
        if not self.examples:
            raise BadData("there is nothing to train on: no example was given; check the data's training split")

    def epoch(self, number: int, settings: Train) -> list[list[int]]:
        """The numbers of the examples of each batch of one epoch."""
        lengths = [len(example.ids) for example in self.examples]
        groups = self._groups() if settings.share_contexts else None
        return self.order(lengths, settings.batch_size, settings.seed, number, groups)

    def _groups(self) -> list[int]:
        """For each example a number that those of the same context share; a classifier's have none in common."""
        numbers: dict[object, int] = {}
        contexts = (self._context(place) for place in range(len(self.examples)))
        return [numbers.setdefault(context, len(numbers)) for context in contexts]

    def _context(self, place: int) -> object:
        """What an example has in common with those of its group."""
        example = self.examples[place]
        return tuple(example.ids[: example.start]) if example.start < len(example.ids) else place

    def steps(self, settings: Train) -> int:
        """How many optimiser steps the settings make of these examples."""
        return settings.steps or math.ceil(settings.epochs * len(self.epoch(0, settings)) / settings.accumulate)

    def plan(self, settings: Train, done: int) -> Iterator[Numbers]:
        """For each step after the first `done`: the numbers of the examples of each of its batches."""
        endless = itertools.chain.from_iterable(self.epoch(number, settings) for number in itertools.count())
        batches = itertools.islice(endless, done * settings.accumulate, None)
        while True:
            yield list(itertools.islice(batches, settings.accumulate))

    def share(self, batches: Numbers, rank: int, size: int, *, contexts: bool) -> Numbers:
        """What one of `size` processes reads of each batch of a step, so that all of them read about as many tokens.

        With `contexts`, examples of one context stay together, as far as no process goes without for that.
        """
        if size == 1:
            return batches
        loads, own = [0] * size, []
        for batch in batches:
            shares: Numbers = [[] for _ in range(size)]
            for unit in sorted(self._units(batch, size, contexts=contexts), key=self._tokens, reverse=True):
                least = loads.index(min(loads))
                loads[least] += self._tokens(unit)
                shares[least] += unit
            own.append(sorted(shares[rank], key=batch.index))
        return own

    def _units(self, batch: Sequence[int], size: int, *, contexts: bool) -> Iterator[list[int]]:
        """Examples that stay together: of one context, and no more than a fair share of the batch."""
        groups: dict[object, list[int]] = {}
        for number in batch:
            groups.setdefault(self._context(number) if contexts else number, []).append(number)
        most = math.ceil(len(batch) / size)
        for group in groups.values():
            yield from (group[at : at + most] for at in range(0, len(group), most))

    def _tokens(self, unit: Sequence[int]) -> int:
        """Tokens to be computed for examples of one context, which is computed once."""
        lengths, start = [len(self.examples[number].ids) for number in unit], self.examples[unit[0]].start
        return sum(lengths) - start * (len(unit) - 1)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The batch of these examples."""
        return self.collate([self.examples[number] for number in numbers], self.pad_id)

    def digest(self) -> str:
        """A fingerprint of all examples, to tell whether a resumed run reads the same data."""
        found = hashlib.sha256()
        for example in self.examples:
            found.update(f"{len(example.ids)},{example.start},{example.label};".encode())
            found.update(array("q", example.ids).tobytes())
        return found.hexdigest()
