"""Running out of memory, and what is left to do about it: smaller forward passes of the same batch."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorakit.errors import OutOfMemory
from lorakit.train.portions import Portion

_log = logging.getLogger(__name__)
_CPU = ("can't allocate memory", "not enough memory")  # how PyTorch's allocator for the CPU says it


@dataclass
class Appetite:
    """The most tokens in one forward pass; it shrinks where memory does not suffice, and stays small."""

    tokens: int

    def shrink(self, step: int, portions: Sequence[Portion]) -> None:
        """Take half of the largest forward pass from now on, and say so.

        Raises:
            OutOfMemory: each example has a forward pass for itself already.
        """
        largest = max(portions, key=lambda portion: portion.computed)
        if all(portion.examples == 1 for portion in portions):
            raise OutOfMemory(
                f"step {step} does not fit into memory, although each example has a forward pass of its own (the "
                f"longest has {largest.computed} tokens); set checkpointing=blocks or a lower max_length"
            )
        divisible = max((p for p in portions if p.examples > 1), key=lambda portion: portion.computed)
        self.tokens = max(divisible.computed // 2, 1)
        _log.warning(
            "step %d does not fit into memory with %d tokens in one forward pass: from here on it has at most %d, with "
            "the same batch; what follows is equal to 1e-5, not to the bit",
            *(step, divisible.computed, self.tokens),
        )
        _clean()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
    True
    """
    told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _CPU)
    return told or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
