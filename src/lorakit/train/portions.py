"""What one forward pass reads of a batch, and the loss as two functions of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.train.feed import Encoded


@dataclass(frozen=True, slots=True)
class Portion:
    """The examples of one forward pass as tensors."""

    inputs: Any
    examples: int
    labelled: int  # things to be learned: tokens, or classes
    computed: int  # places that go through the model, padding counted, shared contexts once


@dataclass(frozen=True, slots=True)
class Loss:
    """How a batch becomes forward passes of at most so many tokens, and the gradients of the mean loss.

    `backward(model, portion, total)` adds the gradients of (sum of the portion's losses) / total and returns the sum.
    """

    portions: Callable[[Sequence[Encoded], int], list[Portion]]
    backward: Callable[[Any, Portion, float], float]
    reads: str  # how, in words
    trains_head: bool = False  # whether the model's head is the task's own, and so has to be trained
