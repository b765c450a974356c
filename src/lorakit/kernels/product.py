"""x Wᵀ + b by oneDNN where PyTorch would take MKL: in float32 on a CPU.

PyTorch carries both. MKL keeps its AVX-512 code for its maker's processors and runs AVX2 on others; oneDNN uses what
the processor has, and is the faster with AVX2 alone, and in thin products, too.

Legend: T tokens (all leading dimensions in one), I in, O out.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_PLAIN = (Tensor, nn.Parameter)  # sharded, quantised and fake tensors are of classes of their own


def takes(*matrices: Tensor) -> bool:
    """Whether there is something to win: plain float32 tensors on a CPU, and no compiler that looks on.

    Example:
        >>> takes(torch.ones(2, 2, dtype=torch.float64))
        False
    """
    plain = all(type(x) in _PLAIN and x.dtype == torch.float32 and x.device.type == "cpu" for x in matrices)
    return plain and all(x.numel() for x in matrices) and not torch.compiler.is_compiling() and _is_here()


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, of matrices in any strides; autograd does not see it.

    Args:
        x_TI: any float dtype.
        weight_OI: W, a view of what is stored where that is its transpose.
        bias_O: what is added to each row.

    Example:
        >>> x, w = torch.randn(3, 4), torch.randn(5, 4)
        >>> torch.allclose(product(x, w), x @ w.T, atol=1e-6)
        True
    """
    if takes(x_TI, weight_OI):
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI.detach(), weight_OI.detach(), bias_O, "none", [], "")
        return made
    return F.linear(x_TI, weight_OI, bias_O)


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
