"""What a step changes around itself and puts back: random state and Ctrl-C."""

from __future__ import annotations

import hashlib
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import numpy
import torch


@contextmanager
def seeded(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Random numbers that depend on the seed and the step alone; the caller's own random state is put back.

    So a resumed run draws what the uninterrupted one drew, and an evaluation between two steps changes neither.
    """
    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    drawn = int.from_bytes(digest) >> 1
    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            random.seed(drawn)
            numpy.random.seed(drawn & 0xFFFFFFFF)
            torch.manual_seed(drawn)
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numbers)


@contextmanager
def held_interrupt() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back inside the block, so that a step is taken wholly or not at all.

    The function that it gives raises the KeyboardInterrupt that was held, if any: call it where stopping is safe,
    and after the block.
    """
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    def release() -> None:
        if held:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield release
        return
    before = signal.signal(signal.SIGINT, hold)
    try:
        yield release
    finally:
        signal.signal(signal.SIGINT, before)
