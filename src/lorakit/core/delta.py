"""What an adapter does at one site: a delta sees a layer's input and output and returns the new output."""

from __future__ import annotations

from abc import ABC
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

    per_row: bool = True  # whether neighbouring rows of a batch may use different adapters
    mixes: ClassVar[bool] = True  # whether a weighted mixture of adapters makes sense
    outer: ClassVar[tuple[str, ...]] = ()  # parameters on the output's side: LoRA+ trains them faster
    unmergeable: ClassVar[str] = ""  # why it cannot be merged, where that is so

    def __init__(self, placement: Placement, layout: Layout | None) -> None:
        super().__init__()
        self.placement = placement
        self.layout = layout

    @property
    def may_rest(self) -> bool:
        """Whether it is right that no forward pass uses this delta (a dropped layer, an idle expert)."""
        return False

    def in_use(self) -> int:
        """How much of its placement's rank does something: all, but where directions are pruned."""
        return self.placement.rank

    def before(self, x: Tensor) -> Tensor:
        """The new input of the module, given its present input."""
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The new output of the site, given the module's input and the site's present output."""
        return y

    def enter(self, module: nn.Module, share: Tensor | None = None) -> None:
        """Called before the module's forward, of deltas that stand in for its weights while it runs.

        `share` is the delta's weight in a mixture; None where its adapter acts alone. Rows of a batch never come here.
        """

    def leave(self, module: nn.Module) -> None:
        """Called after the module's forward, even one that raised."""

    def fold(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The site's new weight (out, in) and bias.

        Raises:
            NotMergeable: the delta is not a change of the layer's weights.
        """
        raise self.refusal()

    def refusal(self) -> NotMergeable:
        """The error that says why this delta cannot be merged."""
        why = self.unmergeable or "is not a change of the layer's weights"
        return NotMergeable(f"the adapter at {self.placement.path} ({self.placement.kind}) cannot be merged: it {why}")

    def act(self, x: Tensor, y: Tensor, inserted_BT: Tensor | None) -> Tensor:
        """`after`, on the site's slice of the module's output.

        `inserted_BT` numbers the positions that a method put into the sequence (-1: a token of the input), if any.
        """
        return self.within(y, lambda part: self.after(x, part))

    def is_fused(self, module: nn.Module) -> bool:
        """Whether `through` takes calls of this module."""
        return False

    def through(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        """A faster twin of `act`, where this delta alone acts on this module now; None where there is none.

        It may write into `y`, the module's output, and owes nothing to the autograd graph behind it.
        """
        return None

    def within(self, y: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `change` to the site's slice of `y`, leaving the other units as they are."""
        part = self.placement.slice
        return change(y) if part is None else part.put(y, change(part.take(y)))

    @classmethod
    def rows(cls, deltas: Sequence[Self | None], rows_B: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Row i of the batch goes through `deltas[rows_B[i]]` (None: unchanged). Here one pass an adapter."""
        for number, delta in enumerate(deltas):
            if delta is not None:
                y = torch.where(_chosen(rows_B, number, y), delta.act(x, y, None), y)
        return y

    def weights(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of the module that merging may change, by their names in it."""
        return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}

    def merged(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's parameters after `fold`, given those of `weights` before (by name, in the layer's storage)."""
        if self.layout is None:
            raise self.refusal()
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


def before_rows(deltas: Sequence[Delta | None], rows_B: Tensor, x: Tensor) -> Tensor:
    """Each row of the input as its own adapter's delta at one slot changes it."""
    for number, delta in enumerate(deltas):
        if delta is not None and changes_input(delta):
            x = torch.where(_chosen(rows_B, number, x), delta.before(x), x)
    return x


def act_on_rows(deltas: Sequence[Delta | None], rows_B: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Send each row through its own adapter's delta at one slot, grouped by the deltas' class."""
    refused = [d for d in deltas if d is not None and not d.per_row]
    if refused:
        raise BadRouting(f"{refused[0].placement.path} cannot use several adapters in one batch")
    for kind in dict.fromkeys(type(delta) for delta in deltas if delta is not None):
        same: list[Any] = [delta if type(delta) is kind else None for delta in deltas]
        y = kind.rows(same, rows_B, x, y)
    return y


def changes_input(delta: Delta) -> bool:
    """Whether the delta sees the module's input before the module does."""
    return type(delta).before is not Delta.before


def stands_in(delta: Delta) -> bool:
    """Whether the delta stands in for the module's weights while it runs."""
    return type(delta).enter is not Delta.enter


def _chosen(rows_B: Tensor, number: int, like: Tensor) -> Tensor:
    return (rows_B == number).view(-1, *[1] * (like.dim() - 1))
