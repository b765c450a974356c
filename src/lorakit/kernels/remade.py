"""Tensors that are cheaper to make again in backward than to keep: what makes them is noted on them.

A norm's output and a gate's product are read by the low-rank updates of the layers that follow, which would keep them
for backward. Their own inputs are kept anyway, and one elementwise pass makes them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

_ATTRIBUTE = "_lorakit_remade"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A function and the tensors that it makes one from."""

    make: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self.make(*tensors)


def remember(made: Tensor, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Note on a tensor how it was made of others (detached); gives the tensor."""
    setattr(made, _ATTRIBUTE, Recipe(make, tensors))
    return made


def recipe(x: Tensor) -> Recipe:
    """How to have `x` in backward: made again where that was noted, else kept.

    >>> import torch
    >>> one = torch.ones(2)
    >>> two = remember(one + one, torch.add, one, one)
    >>> len(recipe(one).tensors), len(recipe(two).tensors)
    (1, 2)
    """
    found: Recipe | None = getattr(x, _ATTRIBUTE, None)
    return found or Recipe(_itself, (x,))


def _itself(x: Tensor) -> Tensor:
    return x
