"""What `_measure` measures by the clock and by a process's memory, of a CUDA device, which works on its own time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import _measure
import torch


def interleaved(steps: Mapping[str, Iterator[Any]], batches: int, rounds: int) -> dict[str, list[list[float]]]:
    """As `_measure.interleaved`; a step is over when the device has done all of it."""
    return _measure.interleaved({name: awaited(each) for name, each in steps.items()}, batches, rounds)


def awaited(steps: Iterator[Any]) -> Iterator[Any]:
    """The same items, each after the device has nothing left to do."""
    torch.cuda.synchronize()
    for item in steps:
        torch.cuda.synchronize()
        yield item


def peak_bytes(work: Callable[..., Iterator[Any]], *args: Any) -> int:
    """How far the device's memory in use rises above what was used when `work(*args)` gave its first item."""
    clean()
    items = work(*args)
    next(items)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in items:
        pass
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def clean() -> None:
    """Give back what nothing refers to."""
    gc.collect()
    torch.cuda.empty_cache()
