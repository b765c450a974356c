"""Gradient checkpointing: `backward` runs a forward again, which must be under the routing it first ran with.

A non-reentrant checkpoint recomputes a layer under the routing that was noted for it last, and every adapted layer
saves a mark of its routing for backward: a recomputation under another one is noticed by the checkpoint itself, which
raises. A reentrant checkpoint saves nothing, so its forwards are counted layer by layer, and each recomputation takes
one off.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from lorakit.core.route import Routing, mark_of
from lorakit.errors import BadState

_REENTRANT = cast(Any, CheckpointFunction.forward).__code__


@dataclass
class Recomputation:
    """What is known of forwards that may be run again."""

    noted: dict[int, list[Routing | None]] = field(default_factory=dict)  # layer -> the last, and one more
    recomputed: bool = False
    waiting: dict[int, list[Routing | None]] = field(default_factory=dict)  # layer -> reentrant forwards

    def routing(self, present: Routing | None, layer: object, *, training: bool) -> Routing | None:
        """The routing for this call of a layer: the present one, or for a recomputation the one it first had.

        Raises:
            BadState: a reentrant recomputation of forwards under several routings, or of one that was not seen.
        """
        if torch._C._current_graph_task_id() == -1:
            self._note(present, layer, training=training)
            return present
        self.recomputed = True
        if _hooks_are_on():
            noted = self.noted.get(id(layer), [])
            return present if not noted or present in noted else noted[-1]
        waiting = self.waiting.get(id(layer), [])
        if len(set(waiting)) != 1:
            self.waiting.clear()  # the next step begins anew
            raise BadState(
                "gradient checkpointing (reentrant) recomputes a layer that ran under several adapters, or under none "
                "that is known: call backward() before the next use(...), put the adapters in one batch with "
                "use(model, [row, row, ...]), or set use_reentrant=False"
            )
        return waiting.pop()

    def _note(self, present: Routing | None, layer: object, *, training: bool) -> None:
        if torch.is_grad_enabled():
            if self.recomputed:
                self.recomputed, self.noted = False, {}
            before = [routing for routing in self.noted.get(id(layer), []) if routing != present]
            self.noted[id(layer)] = [*before[:1], present]
        elif training and _in_reentrant_forward():
            self.waiting.setdefault(id(layer), []).append(present)


def marked(y: Any, routing: Routing | None) -> Any:
    """`y`, if it is a tensor with a mark of the routing saved for backward where a checkpoint is watching."""
    if not isinstance(y, Tensor) or not y.requires_grad or not _hooks_are_on():
        return y
    return _Mark.apply(y, mark_of(routing))  # type: ignore[no-untyped-call]


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, mark: Tensor) -> Tensor:
        ctx.save_for_backward(mark)
        return y.clone()  # of a view, PyTorch would refuse changes in place, which some models make

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _hooks_are_on() -> bool:
    """Whether something (a non-reentrant checkpoint) intercepts what is saved for backward."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _in_reentrant_forward() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _REENTRANT:
        frame = frame.f_back
    return frame is not None
