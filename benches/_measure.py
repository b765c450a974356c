"""What a bench of training steps measures: saved bytes, peak memory, the roof, and time in turn."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.packing import pack
from lorakit.kernels.product import product

SAMPLE_SECONDS = 0.002
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}  # what is freed is given back


class SavedBytes:
    """The most bytes that autograd holds at once for a backward pass: storages counted once, parameters not at all.

    Example:
        >>> layer, x = nn.Linear(4, 3), torch.randn(2, 4)
        >>> with SavedBytes(layer).counted() as saved:
        ...     layer(x).square().sum().backward()
        >>> saved.most, saved.now
        (56, 0)
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._holders: Counter[int] = Counter()
        self.now = self.most = 0

    @contextmanager
    def counted(self) -> Iterator[SavedBytes]:
        """Count what is saved inside the block."""
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Held(self, tensor), lambda held: held.tensor):
            yield self

    def change(self, tensor: Tensor, by: int) -> None:
        """One holder more, or less, of the tensor's storage."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        self._holders[place] += by
        if place not in self._own and self._holders[place] == max(by, 0):  # the first, or the last
            self.now += by * storage.nbytes()
            self.most = max(self.most, self.now)


class _Held:
    """One tensor that autograd saved, for as long as it keeps it."""

    def __init__(self, ledger: SavedBytes, tensor: Tensor) -> None:
        self.ledger, self.tensor = ledger, tensor
        ledger.change(tensor, 1)

    def __del__(self) -> None:
        self.ledger.change(self.tensor, -1)


@contextmanager
def gradients(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Copies of the gradients that backward makes inside the block, before anything clips them."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda parameter: found.update({name: parameter.grad.clone()})

    handles = [
        parameter.register_post_accumulate_grad_hook(keep(name))
        for name, parameter in parameters.items()
        if parameter.requires_grad
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def cosine(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Of all gradients as one vector; both have the same names.

    >>> one = {"a": torch.ones(2), "b": torch.ones(1)}
    >>> round(cosine(one, {"a": 2 * torch.ones(2), "b": 2 * torch.ones(1)}), 6)
    1.0
    """
    if ours.keys() != theirs.keys():
        raise SystemExit(f"gradients of different tensors: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    one, other = (torch.cat([found[name].double().flatten() for name in sorted(ours)]) for found in (ours, theirs))
    return float(F.cosine_similarity(one, other, dim=0))


def interleaved(steps: Mapping[str, Iterator[Any]], batches: int, rounds: int) -> dict[str, list[list[float]]]:
    """Seconds of each step, by name and batch: all take the same batch, one after another, each in turn the first."""
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(batches)] for name in steps}
    names = list(steps)
    for number in range(rounds * batches):
        for name in names:
            began = time.perf_counter()
            next(steps[name])
            seconds[name][number % batches].append(time.perf_counter() - began)
        names = [*names[1:], names[0]]
    return seconds


def foreign_seconds() -> float:
    """Processor time that all processes but this one have had since the machine started."""
    times, mine = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = sum(value for name, value in times._asdict().items() if name in ("idle", "iowait"))
    return float(sum(times) - idle - mine.user - mine.system)


def peak_bytes(work: Callable[..., Iterator[Any]], *args: Any) -> int:
    """How far the memory of a fresh process rises above what it held when `work(*args)` gave its first item."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with _environment(MALLOC):
        process = context.Process(target=_work, args=(there, work, args), daemon=True)
        process.start()
    there.close()
    here.recv()
    watched = psutil.Process(process.pid)
    before = most = watched.memory_info().rss
    here.send("go on")
    while not here.poll(SAMPLE_SECONDS):
        most = max(most, watched.memory_info().rss)
    here.recv()  # raises EOFError where the process failed
    process.join()
    return int(most - before)


def _work(connection: Connection, work: Callable[..., Iterator[Any]], args: Sequence[Any]) -> None:
    items = work(*args)
    next(items)
    connection.send("ready")
    connection.recv()
    for _ in items:
        pass
    connection.send("done")


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that processes started inside the block inherit."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@torch.no_grad()
def matrix_rate(model: Any, tokens: int, repeats: int = 10) -> float:
    """The best FLOP/s of the matrix products of the model's first layer and of its head, for so many tokens."""
    head, body = _matrices(model)
    layer = [weight for name, weight in body if ".0." in name]
    flops = seconds = 0.0
    for weight in (*layer, head):
        x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
        seconds += min(_product_seconds(x, weight) for _ in range(repeats))
        flops += 2 * tokens * weight.numel()
    return flops / seconds


def _product_seconds(x: Tensor, weight: Tensor) -> float:
    began = time.perf_counter()
    product(x, weight)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _matrices(model: Any) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """The head's weight, and those of all other linear layers of a base without an adapter."""
    head = model.get_output_embeddings()
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return head.weight, [(name, module.weight) for name, module in linear if module is not head]


def needed_flops(model: Any, batch: Sequence[Any], adapter: int) -> dict[str, float]:
    """What a step on the batch has to compute: tokens without padding, shared contexts once, labelled rows of the head.

    With N body and adapter parameters, H of the head, a = the forward pass of causal attention:
    "lora" 4 N tokens + 6 adapter tokens + 4 H labelled + 3.5 a; "full" 6 N tokens + 6 H labelled + 3.5 a.
    """
    line, config = pack(batch), model.config
    tokens, labelled = len(line.ids_T), len(line.targets_N)
    pairs = sum(s.queries * (s.keys - s.queries) + s.queries * (s.queries + 1) / 2 for s in line.segments.segments)
    width = config.num_attention_heads * config.head_dim
    attention = 3.5 * 4 * width * config.num_hidden_layers * pairs
    head, body = _matrices(model)
    size = sum(weight.numel() for _, weight in body)
    lora = 4 * (size * tokens + head.numel() * labelled) + 6 * adapter * tokens
    return {"lora": lora + attention, "full": 6 * (size * tokens + head.numel() * labelled) + attention}
