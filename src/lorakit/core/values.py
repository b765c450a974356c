"""Tensors that are read when they are wanted: shape and dtype are known before, so a header tells all of a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of a file, or one that is made from such tensors; each `read` makes it anew, in memory of its own.

    >>> halves = value_of(torch.eye(2)).then(lambda tensor: tensor[:1] / 2, (1, 2))
    >>> halves.shape, halves.read().tolist()
    ((1, 2), [[0.5, 0.0]])
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """What it takes in a file."""
        return self.numel * self.dtype.itemsize

    def then(
        self,
        change: Callable[[Tensor], Tensor],
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Value:
        """What `change` makes of it, of this shape and dtype (default: its own)."""
        return Value(tuple(self.shape if shape is None else shape), dtype or self.dtype, lambda: change(self.read()))


def value_of(tensor: Tensor) -> Value:
    """A tensor that is in memory already."""
    return Value(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def cast(value: Value, dtype: torch.dtype) -> Value:
    """The same numbers in another dtype; the value itself where it has it."""
    return value if value.dtype == dtype else value.then(lambda tensor: tensor.to(dtype), dtype=dtype)
