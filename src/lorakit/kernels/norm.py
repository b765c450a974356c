"""The norm of a frozen model: root mean square, with a weight that takes no gradient.

Legend: H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels import launch
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
    normed, inverse = _RMSNorm.apply(x, weight_H, eps)  # type: ignore[no-untyped-call]
    return remember(normed, _normed, x.detach(), weight_H, inverse)


def _made(x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if launch.takes(x, weight_H) and weight_H.shape == x.shape[-1:]:
        from lorakit.kernels import triton_norm

        return triton_norm.normed(x, weight_H, eps)
    inverse = _inverse(x, eps)
    return _normed(x, weight_H, inverse), inverse


def _inverse(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps) of each token, float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _normed(x: Tensor, weight_H: Tensor, inverse: Tensor) -> Tensor:
    if launch.takes(x, weight_H) and weight_H.shape == x.shape[-1:]:
        from lorakit.kernels import triton_norm

        return triton_norm.normed_again(x, weight_H, inverse)
    return (x * inverse).to(x.dtype).mul_(weight_H)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, inverse = _made(x, weight_H, eps)
        ctx.save_for_backward(x, weight_H, inverse)
        ctx.mark_non_differentiable(inverse)
        ctx.set_materialize_grads(False)
        return normed, inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor, None, None]:
        x, weight_H, inverse = ctx.saved_tensors
        if launch.takes(gradient, x, weight_H):
            from lorakit.kernels import triton_norm

            return triton_norm.gradient_of_x(gradient, x, weight_H, inverse), None, None
        wide, weighted = x.to(inverse.dtype), (gradient * weight_H).to(inverse.dtype)
        along = torch.linalg.vecdot(weighted, wide)[..., None] * inverse.square() / -x.shape[-1]
        return weighted.addcmul_(wide, along).mul_(inverse).to(x.dtype), None, None
