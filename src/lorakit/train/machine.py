"""The machine that a run is planned for: the one at hand, measured, or one known by its data sheet."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from lorakit.errors import LorakitError, UnknownName, nearest
from lorakit.kernels.product import product

_ENOUGH_SECONDS = 0.01  # a matrix product of this length shows what the machine can do
_TRY_SECONDS = 0.1  # for each size
_CGROUP = Path("/sys/fs/cgroup")  # where Linux tells a container what it may use


@dataclass(frozen=True)
class Machine:
    """One device and what it can do.

    >>> machine("h100").memory_bytes
    80000000000
    """

    name: str
    device: str  # "cpu" or "cuda"
    memory_bytes: int  # that a run may use
    flops_per_second: float  # in matrix products; a multiplication and an addition are two
    source: str  # where the two numbers are from


class _Sheet(NamedTuple):
    """What a maker's data sheet says: without sparsity, and in float32 without tensor cores."""

    gigabytes: int
    teraflops_16: float
    teraflops_32: float
    bfloat16: bool = True  # whether its tensor cores take it; else it is no faster than float32


SHEETS = {
    "t4": _Sheet(16, 65, 8.1, bfloat16=False),
    "v100": _Sheet(32, 125, 15.7, bfloat16=False),
    "a10": _Sheet(24, 125, 31.2),
    "l4": _Sheet(24, 121, 30.3),
    "l40s": _Sheet(48, 362, 91.6),
    "rtx4090": _Sheet(24, 165, 82.6),
    "a100-40gb": _Sheet(40, 312, 19.5),
    "a100": _Sheet(80, 312, 19.5),
    "h100": _Sheet(80, 989, 67),
    "h200": _Sheet(141, 989, 67),
}
AT_HAND = ("cpu", "cuda")


def machine(name: str | None = None, dtype: torch.dtype | None = None) -> Machine:
    """The device of this name: a known one, or `cpu` or `cuda` at hand (None: the better of them), measured in `dtype`.

    The free memory counts, so ask before the model is loaded. The dtype is, if not given, `usual_dtype`.

    Raises:
        UnknownName: no such device; the message gives the nearest names.
        LorakitError: `cuda` where there is none.
    """
    name = (name or ("cuda" if torch.cuda.is_available() else "cpu")).lower()
    dtype = dtype or usual_dtype(name)
    if name in SHEETS:
        sheet = SHEETS[name]
        is_slow = dtype.itemsize > 2 or (dtype == torch.bfloat16 and not sheet.bfloat16)
        teraflops = sheet.teraflops_32 if is_slow else sheet.teraflops_16
        return Machine(name, "cuda", sheet.gigabytes * 10**9, teraflops * 1e12, "data sheet")
    if name not in AT_HAND:
        raise UnknownName(f"there is no machine called {name!r}; {nearest(name, (*AT_HAND, *SHEETS))}")
    if name == "cuda" and not torch.cuda.is_available():
        raise LorakitError("there is no CUDA device here; plan for cpu, or for a known device such as h100")
    free = torch.cuda.mem_get_info()[0] if name == "cuda" else free_memory()
    return Machine(name, name, free, measured_flops(name, dtype), f"free memory and {_word(dtype)} products, measured")


def usual_dtype(name: str | None) -> torch.dtype:
    """bfloat16 on an accelerator, float32 on a CPU (where other types can be hundreds of times slower)."""
    on_cpu = name == "cpu" or (name is None and not torch.cuda.is_available())
    return torch.float32 if on_cpu else torch.bfloat16


def free_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes of RAM that are available here, or as many as the container's limit leaves; a file's pages give way."""
    import psutil  # type: ignore[import-untyped]

    available = int(psutil.virtual_memory().available)
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        pages = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        held = int(used) - int(pages["inactive_file"])
        return available if limit == "max" else min(available, max(int(limit) - held, 0))
    except (OSError, ValueError, KeyError):
        return available


@cache
def measured_flops(device: str, dtype: torch.dtype) -> float:
    """Operations a second in products of square matrices, larger and larger until one takes some milliseconds."""
    best, size = 0.0, 512
    while True:
        x, y = torch.randn(2, size, size, device=device).to(dtype)
        seconds = _fastest(x, y)
        best = max(best, 2 * size**3 / seconds)
        if seconds > _ENOUGH_SECONDS or size >= 8192:
            return best
        size *= 2


def _fastest(x: torch.Tensor, y: torch.Tensor) -> float:
    """The shortest time that the product took: other programs on the machine can only make it longer."""
    taken = [_seconds(x, y)]  # the first may start threads
    while len(taken) < 3 or sum(taken) < _TRY_SECONDS:
        taken.append(_seconds(x, y))
    return min(taken)


def _seconds(x: torch.Tensor, y: torch.Tensor) -> float:
    _wait(x)
    began = time.perf_counter()
    product(x, y)
    _wait(x)
    return time.perf_counter() - began


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
