"""Where Triton's kernels may take the place of plain PyTorch, and how one is started.

Nothing here imports Triton: that happens when the first kernel is asked for.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)
PLAIN = (Tensor, nn.Parameter)  # sharded, quantised and fake tensors are of classes of their own
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels may have these: plain tensors of one CUDA device on which Triton runs, float32 or narrower.

    Under `torch.compile` they may not: the compiler sees through the plain twin and fuses it with what is around it.

    Example:
        >>> takes(torch.zeros(2))
        False
    """
    device = tensors[0].device
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    alike = all(type(x) in PLAIN and x.dtype in _DTYPES and x.device == device for x in tensors)
    return alike and runs_on(device)


@cache
def runs_on(device: torch.device) -> bool:
    """Whether a kernel starts there. If not (Triton, its C compiler or the device's age), a warning says why."""
    try:
        from lorakit.kernels.triton_gated import product

        one = torch.ones(1, 1, device=device)
        product(one, one, "silu")
    except Exception as error:  # Triton's, the compiler's and the driver's own
        _log.warning("Triton does not run on %s, so plain PyTorch does: %s: %s", device, type(error).__name__, error)
        return False
    return True


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Start `kernel` on the device of its first argument, which need not be the current one."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **settings)


def rows(x: Tensor) -> Tensor:
    """`x` as (rows, last dimension), the numbers of a row side by side: a view wherever there is one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()
