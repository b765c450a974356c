"""The norm of a frozen model: root mean square, with a weight that takes no gradient.

Legend: H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels.remade import remember


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """w · x / sqrt(mean(x²) + eps) over the last dimension, w frozen (Zhang and Sennrich 2019, arXiv:1910.07467).

    Saved for backward are x, by reference, and one number a token. The mean is float32 whatever the dtype of x; the
    normed value is rounded to it before it meets w, as Llama's norm does.

    Example:
        >>> x, weight = torch.randn(2, 5), torch.ones(5)
        >>> torch.allclose(rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (5,), weight, 1e-6), atol=1e-6)
        True
    """
    inverse = _inverse(x.detach(), eps)
    normed: Tensor = _RMSNorm.apply(x, weight_H, inverse)  # type: ignore[no-untyped-call]
    return remember(normed, _normed, x.detach(), weight_H, inverse)


def _inverse(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps) of each token, float32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _normed(x: Tensor, weight_H: Tensor, inverse: Tensor) -> Tensor:
    return (x * inverse).to(x.dtype).mul_(weight_H)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_H, inverse)
        return _normed(x, weight_H, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight_H, inverse = ctx.saved_tensors
        wide, weighted = x.float(), (gradient * weight_H).float()
        along = torch.linalg.vecdot(weighted, wide)[..., None] * inverse.square() / -x.shape[-1]
        return weighted.addcmul_(wide, along).mul_(inverse).to(x.dtype), None, None
