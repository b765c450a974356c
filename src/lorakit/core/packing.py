"""Examples in one line of tokens without padding, in which what several of them begin with alike stands once.

The examples of a batch are a tree of prefixes: a shared context (or system prompt) is a node, its targets are branches.
Each node's tokens are computed once, attend to the nodes above them and to themselves, and so have the hidden states
that each example would have given them alone: for causal models loss and gradients are the same.

Legend: T tokens of the line, N labelled positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Protocol

import torch
from torch import Tensor

from lorakit.kernels.segments import Segment, Segments

_WORTH = 16  # tokens that a prefix has to save to be a segment of its own
_DEEPEST = 100  # prefixes of prefixes


class Example(Protocol):
    """Token ids, of which those from `start` on are to be learned."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def start(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A flattened batch: the hidden state at `predictors_N[i]` predicts `targets_N[i]`."""

    ids_T: Tensor
    positions_T: Tensor
    segments: Segments
    predictors_N: Tensor
    targets_N: Tensor


@dataclass(frozen=True, slots=True)
class _Node:
    """Tokens that all these examples have in places `start` to `stop`, and what each of them goes on with."""

    start: int
    stop: int
    members: tuple[int, ...]  # numbers of examples; the first has the tokens
    branches: tuple[_Node, ...]


def pack(examples: Sequence[Example], *, share: bool = True) -> Line:
    """Put examples into one line; with `share`, what they begin with alike once.

    The last token of an example is only predicted, so it is no input.

    Example:
        >>> from types import SimpleNamespace as Pair
        >>> asked = tuple(range(20))
        >>> line = pack([Pair(ids=(*asked, 30, 31), start=20), Pair(ids=(*asked, 40), start=20)])
        >>> len(line.ids_T), line.targets_N.tolist(), line.predictors_N.tolist()
        (21, [30, 31, 40], [19, 20, 19])
    """
    inputs = [tuple(example.ids[:-1]) for example in examples]
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    places: dict[int, list[int]] = {}  # of each example's tokens in the line
    for node, above in _walk(_forest(inputs, share=share)):
        sees = tuple(run for run in above if run[0] < run[1])
        begin = len(ids)
        ids.extend(inputs[node.members[0]][node.start : node.stop])
        positions.extend(range(node.start, node.stop))
        if len(ids) > begin:
            segments.append(Segment(begin, len(ids), sees))
        own = [place for start, stop in (*sees, (begin, len(ids))) for place in range(start, stop)]
        places.update(dict.fromkeys(node.members, own))
    labelled = [
        (places[number][place - 1], example.ids[place])
        for number, example in enumerate(examples)
        for place in range(max(example.start, 1), len(example.ids))
    ]
    predictors_N, targets_N = torch.tensor(labelled, dtype=torch.long).reshape(-1, 2).unbind(1)
    return Line(torch.tensor(ids), torch.tensor(positions), Segments(segments), predictors_N, targets_N)


def divide(examples: Sequence[Example], most: int, *, share: bool = True) -> list[list[int]]:
    """The numbers of examples in parts of at most `most` tokens (one longer example is a part); prefixes stay together.

    >>> from types import SimpleNamespace as Pair
    >>> divide([Pair(ids=(1, 2, 3), start=1), Pair(ids=(1,) * 6, start=1), Pair(ids=(1, 2, 4), start=1)], most=6)
    [[1], [0, 2]]
    """
    parts: list[list[int]] = []
    tokens, before = 0, tuple[int, ...]()
    for number, ids in sorted(enumerate(tuple(example.ids) for example in examples), key=itemgetter(1)):
        saved = max(_alike(before, ids) - _WORTH + 1, 0) if share else 0  # `pack` may leave out a bit of what is alike
        if not parts or tokens + len(ids) - saved > most:
            parts.append([])
            tokens, saved = 0, 0
        parts[-1].append(number)
        tokens, before = tokens + len(ids) - saved, ids
    return parts


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _forest(inputs: Sequence[tuple[int, ...]], *, share: bool) -> tuple[_Node, ...]:
    if not share:
        return tuple(_apart(inputs, range(len(inputs)), 0))
    return tuple(_grown(inputs, sorted(range(len(inputs)), key=inputs.__getitem__), 0))


def _apart(inputs: Sequence[tuple[int, ...]], numbers: Iterable[int], start: int) -> Iterator[_Node]:
    return (_Node(start, len(inputs[number]), (number,), ()) for number in numbers)


def _grown(
    inputs: Sequence[tuple[int, ...]], numbers: list[int], start: int, deepest: int = _DEEPEST
) -> Iterator[_Node]:
    """The nodes of examples (in the order of their tokens) from place `start` on."""
    if len(numbers) == 1 or not deepest:
        yield from _apart(inputs, numbers, start)
        return
    alike = _alike(inputs[numbers[0]], inputs[numbers[-1]])
    ended = [number for number in numbers if len(inputs[number]) == alike]
    further = [list(same) for _, same in groupby(numbers[len(ended) :], key=lambda number: inputs[number][alike])]
    if (alike - start) * (len(numbers) - 1) >= _WORTH:
        branches = tuple(node for part in further for node in _grown(inputs, part, alike, deepest - 1))
        yield _Node(start, alike, tuple(numbers), branches)
    else:
        yield from _apart(inputs, ended, start)
        for part in further:
            yield from _grown(inputs, part, start, deepest - 1)


def _walk(forest: Sequence[_Node]) -> Iterator[tuple[_Node, tuple[tuple[int, int], ...]]]:
    """Each node with the runs of the line that lie above it."""
    length = 0
    stack: list[tuple[_Node, tuple[tuple[int, int], ...]]] = [(node, ()) for node in reversed(forest)]
    while stack:
        node, above = stack.pop()
        yield node, above
        run = (length, length + node.stop - node.start)
        length = run[1]
        stack += [(branch, (*above, run)) for branch in reversed(node.branches)]
