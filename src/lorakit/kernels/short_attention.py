"""Attention of short sequences on a CPU, in batched products: there SDPA's blocks are as long as the sequences.

Legend: S sequences, H heads, G heads that share keys, Q queries, K keys, D head width.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST: Final = 160  # keys; what is kept here grows with their square


def short_attention(q_SHQD: Tensor, k_SGKD: Tensor, v_SGKD: Tensor, mask_SQK: Tensor, scale: float) -> Tensor:
    """softmax(scale q kᵀ + mask) v, of (S, H, Q, D); neighbouring query heads share the key heads.

    Saved for backward are q, k, v and the probabilities.

    Args:
        q_SHQD: queries, float32 or wider.
        k_SGKD: keys, of as many heads or of a divisor of their number.
        v_SGKD: values, of the heads of the keys and of any width.
        mask_SQK: what is added to the scores, -inf where nothing is seen; its first dimension may be 1.
        scale: of the scores.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8)
        >>> found = short_attention(q, k, v, torch.zeros(1, 5, 5), 0.5)
        >>> wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        >>> torch.allclose(found, wanted, atol=1e-5)
        True
    """
    made: Tensor = _ShortAttention.apply(q_SHQD, k_SGKD, v_SGKD, mask_SQK, scale)  # type: ignore[no-untyped-call]
    return made


def fits(q: Tensor, keys: int, dropout: float) -> bool:
    """Whether a call is one for these products."""
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64) and keys <= LONGEST and not dropout


class _ShortAttention(torch.autograd.Function):
    """Query heads that share keys stand below each other, as the rows of one matrix."""

    @staticmethod
    def forward(ctx: Any, q_SHQD: Tensor, k_SGKD: Tensor, v_SGKD: Tensor, mask_SQK: Tensor, scale: float) -> Tensor:
        sequences, heads, queries, width = q_SHQD.shape
        shared, keys = k_SGKD.shape[1:3]
        q = (q_SHQD * scale).reshape(sequences * shared, -1, width)
        k, v = (x.reshape(sequences * shared, keys, -1) for x in (k_SGKD, v_SGKD))
        scores = torch.bmm(q, k.mT)
        scores.view(sequences, heads, queries, keys).add_(mask_SQK[:, None].to(q.dtype))
        p = torch.softmax(scores, -1, out=scores)
        ctx.save_for_backward(q, k, v, p)
        ctx.shapes, ctx.scale = (q_SHQD.shape, k_SGKD.shape, v_SGKD.shape), scale
        return torch.bmm(p, v).view(sequences, heads, queries, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        g = gradient.reshape(*q.shape[:2], -1)
        g_scores = torch._softmax_backward_data(torch.bmm(g, v.mT), p, -1, p.dtype)
        g_q, g_k, g_v = torch.bmm(g_scores, k).mul_(ctx.scale), torch.bmm(g_scores.mT, q), torch.bmm(p.mT, g)
        return *(g.view(shape) for g, shape in zip((g_q, g_k, g_v), ctx.shapes, strict=True)), None, None
