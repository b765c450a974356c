"""x Wᵀ + b by oneDNN where PyTorch would take MKL: in float32 on a CPU.

PyTorch carries both. MKL keeps its AVX-512 code for its maker's processors and runs AVX2 on others; oneDNN uses what
the processor has, and is the faster with AVX2 alone, too. It compiles a kernel for each shape and keeps it, so numbers
of tokens are rounded up to few different ones.

Legend: T tokens (all leading dimensions in one), I in, O out, R rank.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels.launch import PLAIN

_LEAST = 2**15  # multiplications; fewer take less time than the call


def takes(*tensors: Tensor) -> bool:
    """Whether there is something to win: plain float32 tensors on a CPU, and no compiler that looks on.

    Example:
        >>> takes(torch.ones(2, 2, dtype=torch.float64))
        False
    """
    plain = all(type(x) in PLAIN and x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
    watched = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return plain and all(x.numel() for x in tensors) and not watched and _is_here()


def round_number(tokens: int) -> int:
    """The next number of tokens for which kernels are made: 32 between each two powers of two.

    >>> [round_number(tokens) for tokens in (1, 63, 65, 504, 1000, 1025)]
    [1, 63, 66, 504, 1008, 1056]
    """
    step = max(1 << tokens.bit_length() >> 6, 1)
    return -(-tokens // step) * step


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, of matrices in any strides; autograd does not see it.

    Args:
        x_TI: any float dtype; where T is not a `round_number`, a copy with more rows is made.
        weight_OI: W, a view of what is stored where that is its transpose.
        bias_O: what is added to each row.

    Example:
        >>> x, w = torch.randn(3, 4), torch.randn(5, 4)
        >>> torch.allclose(product(x, w), x @ w.T, atol=1e-6)
        True
    """
    worth = len(x_TI) * weight_OI.numel() >= _LEAST
    if not worth or not takes(x_TI, weight_OI, *(() if bias_O is None else (bias_O,))):
        return F.linear(x_TI, weight_OI, bias_O)
    more = round_number(len(x_TI)) - len(x_TI)
    x = F.pad(x_TI.detach(), (0, 0, 0, more)) if more else x_TI.detach()
    bias = None if bias_O is None else bias_O.detach().contiguous()
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI.detach(), bias, "none", [], "")
    return made[: len(x_TI)]


def over_tokens(g_TR: Tensor, x_TI: Tensor) -> Tensor:
    """gᵀ x (R, I): the sum over tokens of a thin matrix and another.

    Example:
        >>> g, x = torch.randn(7, 2), torch.randn(7, 5)
        >>> torch.allclose(over_tokens(g, x), g.T @ x, atol=1e-6)
        True
    """
    if round_number(len(x_TI)) == len(x_TI):
        return product(g_TR.T, x_TI.T)
    return g_TR.T @ x_TI


def along_last(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`product` over the last dimension of x (…, in)."""
    return product(x.reshape(-1, x.shape[-1]), weight_OI, bias_O).view(*x.shape[:-1], len(weight_OI))


def frozen_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b as a step of autograd, of x alone, which keeps nothing but W.

    Example:
        >>> x, w = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4)
        >>> frozen_linear(x, w).sum().backward()
        >>> torch.allclose(x.grad, w.sum(0).expand(2, 3, 4), atol=1e-6)
        True
    """
    made: Tensor = _FrozenLinear.apply(x, weight_OI, bias_O)  # type: ignore[no-untyped-call]
    return made


@cache
def _is_here() -> bool:
    """Whether this PyTorch carries oneDNN, and what its own compiler calls of it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return along_last(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight_OI,) = ctx.saved_tensors
        return along_last(gradient, weight_OI.T), None, None
