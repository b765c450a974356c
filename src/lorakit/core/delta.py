"""What an adapter does at one site: a delta sees a layer's input and output and returns the new output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lorakit.core.layouts import Layout
from lorakit.core.plan import Placement
from lorakit.errors import BadRouting, NotMergeable


class Delta(nn.Module, ABC):
    """One site's change: `after` is its map in a forward pass, `fold` the same map written into the weights.

    A law says that the two agree. Parameters are float32 masters whatever the base's dtype; `after` casts *them*.

    Example:
        A delta is a module with `after` (and `fold`, where it can be merged):

        >>> class Shift(Delta):
        ...     def __init__(self, placement, layout, width):
        ...         super().__init__(placement, layout)
        ...         self.shift = nn.Parameter(torch.zeros(width))
        ...     def after(self, x, y): return y + self.shift
        ...     def fold(self, weight, bias): return weight, bias + self.shift
    """

    per_row: ClassVar[bool] = True  # whether neighbouring rows of a batch may use different adapters

    def __init__(self, placement: Placement, layout: Layout | None) -> None:
        super().__init__()
        self.placement = placement
        self.layout = layout

    @abstractmethod
    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The new output of the site, given the module's input and the site's present output."""

    def fold(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The site's new weight (out, in) and bias.

        Raises:
            NotMergeable: the delta is not a change of the layer's weights.
        """
        raise NotMergeable(f"{type(self).__name__} at {self.placement.path} cannot be merged into the weights")

    def act(self, x: Tensor, y: Tensor) -> Tensor:
        """`after`, on the site's slice of the module's output."""
        return self.within(y, lambda part: self.after(x, part))

    def within(self, y: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `change` to the site's slice of `y`, leaving the other units as they are."""
        part = self.placement.slice
        return change(y) if part is None else part.put(y, change(part.take(y)))

    @classmethod
    def rows(cls, deltas: Sequence[Self | None], rows_B: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Row i of the batch goes through `deltas[rows_B[i]]` (None: unchanged). Here one pass an adapter."""
        for number, delta in enumerate(deltas):
            if delta is not None:
                chosen = (rows_B == number).view(-1, *[1] * (y.dim() - 1))
                y = torch.where(chosen, delta.act(x, y), y)
        return y

    def merged(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's own parameters after `fold`, given them before (by name, in the layer's own storage)."""
        if self.layout is None:
            raise NotMergeable(f"{self.placement.path} has no weight matrix to merge into")
        part, weight, bias = self.placement.slice, self.layout.matrix(values["weight"]), values.get("bias")
        if part is None:
            weight, bias = self.fold(weight, bias)
        else:
            rows, tail = self.fold(part.take(weight, 0), None if bias is None else part.take(bias))
            weight = part.put(weight, rows, 0)
            bias = bias if bias is None or tail is None else part.put(bias, tail)
        folded = {"weight": self.layout.stored(weight, values["weight"])}
        return folded if bias is None else folded | {"bias": bias}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to another device, but keep the masters' dtype under `.half()` and `.to(dtype)`."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]


def act_on_rows(deltas: Sequence[Delta | None], rows_B: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Send each row through its own adapter's delta at one slot, grouped by the deltas' class."""
    refused = [d for d in deltas if d is not None and not d.per_row]
    if refused:
        raise BadRouting(f"{refused[0].placement.path} cannot use several adapters in one batch")
    for kind in dict.fromkeys(type(delta) for delta in deltas if delta is not None):
        same: list[Any] = [delta if type(delta) is kind else None for delta in deltas]
        y = kind.rows(same, rows_B, x, y)
    return y
