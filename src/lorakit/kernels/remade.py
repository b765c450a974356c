"""Tensors that are cheaper to make again in backward than to keep: what makes them is noted on them.

A norm's output and a gate's product are read by the low-rank updates of the layers that follow, which would keep them
for backward. Their own inputs are kept anyway, and one elementwise pass makes them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

_ATTRIBUTE = "_lorakit_remade"


@dataclass(slots=True)
class Remaker:
    """Makes a tensor again of what was saved; it holds nothing that checkpoints are to let go of."""

    make: Callable[..., Tensor]
    readers: int = 0  # that are going to ask for it in backward
    made: Tensor | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Make it for the first reader, and keep it until the last has had it."""
        found = self.make(*tensors) if self.made is None else self.made
        self.readers -= 1
        self.made = found if self.readers > 0 else None
        return found


def remember(made: Tensor, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Note on a tensor how it was made of others (detached); gives the tensor."""
    setattr(made, _ATTRIBUTE, (Remaker(make), tensors, _version(made)))
    return made


def recipe(x: Tensor) -> tuple[Remaker, tuple[Tensor, ...]]:
    """How one more reader has `x` in backward: made again where that was noted, else kept; and what to save for it.

    >>> import torch
    >>> one = torch.ones(2)
    >>> two = remember(one + one, torch.add, one, one)
    >>> len(recipe(one)[1]), len(recipe(two)[1])
    (1, 2)
    """
    remaker, tensors, version = getattr(x, _ATTRIBUTE, None) or (Remaker(_itself), (x,), _version(x))
    if version != _version(x):  # somebody has changed it in place since
        remaker, tensors = Remaker(_itself), (x,)
    remaker.readers += 1
    return remaker, tensors


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _itself(x: Tensor) -> Tensor:
    return x
