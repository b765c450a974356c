"""Carries out small training runs as one of several processes, one run after the other, for the tests."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lorakit as lk
from lorakit import train
from lorakit.core.method import Method
from lorakit.core.state import adapter_tensors
from lorakit.train import planner
from lorakit.train.distributed import here, opened
from tests.tiny import tiny
from tests.train.small import SETTINGS, examples, feed

LORA = {"name": "lora", "rank": 2, "targets": ["attn.q", "attn.v"]}


@dataclass(frozen=True)
class Order:
    """One run: its folder, what is different from SETTINGS, and what befalls it."""

    out: str
    settings: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=lambda: LORA)
    family: str = "llama"
    labels: int | None = None
    resume: bool = False
    stop_after: int = 99
    signal: tuple[int, int, int] = (-1, -1, 0)  # a process, the step in which it gets a signal, and that
    most_tokens: int | None = None  # that fit into one forward pass of the second process
    room_bytes: int | None = None  # on the device, beside the base
    nan_at: int | None = None  # a token that makes hidden states that are no numbers
    seeds: tuple[int, int] = (0, 0)  # of each process's examples


def carry_out(order: Order) -> None:
    """Train, and leave each process's adapter in the folder; the first one's also as `lorakit.save` writes it."""
    torch.manual_seed(1)
    model, rank, taken = tiny(order.family, labels=order.labels), here().rank, [0]
    lk.attach(model, Method.from_json(order.method), name="a")
    model.get_input_embeddings().register_forward_hook(partial(befall, order, taken))
    settings, data = replace(SETTINGS, **order.settings), feed(examples(20, order.seeds[rank], order.labels))
    evaluations = ({"loss": 1.0 - rank * number} for number in itertools.count())  # not better in the first process
    told = {"out": order.out, "resume": order.resume, "evaluate": lambda: next(evaluations)}
    with little_room(order.room_bytes):
        steps = train.run(model, data, settings, name="a", **told)
    for step in steps:
        taken[0] = step.step
        if step.step == order.stop_after:
            steps.close()
    tensors = {name: tensor.detach().clone() for name, tensor in adapter_tensors(model, "a").items()}
    local = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
    save_file(tensors, Path(order.out) / f"rank-{rank}.safetensors", {"parameters": str(local)})
    if here().is_first:
        lk.save(model, "a", Path(order.out) / "adapter")


@contextmanager
def little_room(room_bytes: int | None) -> Iterator[None]:
    """Let the planner find no more memory than this."""
    found = planner.machine_named
    if room_bytes is not None:
        planner.machine_named = lambda *given: replace(found(*given), memory_bytes=room_bytes)
    try:
        yield
    finally:
        planner.machine_named = found


def befall(order: Order, taken: list[int], module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
    """A signal, too little memory, or a broken number, in a forward pass of training."""
    ids, rank = args[0], here().rank
    if not torch.is_grad_enabled():
        return None
    if (rank, taken[0] + 1) == tuple(order.signal[:2]):
        os.kill(os.getpid(), order.signal[2])
    if order.most_tokens and rank == 1 and ids.numel() > order.most_tokens:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return output.masked_fill((ids == order.nan_at)[..., None], math.nan) if order.nan_at else None


def main(orders: str, timeout_seconds: float = 60) -> None:
    torch.set_num_threads(1)
    with opened(timeout_seconds):
        for order in json.loads(orders):
            carry_out(Order(**order))


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:]))
