"""A frozen linear layer and its low-rank update as one step of autograd.

Legend: T tokens (all leading dimensions in one), I in, O out, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels import launch
from lorakit.kernels.product import over_tokens, product
from lorakit.kernels.remade import recipe


def low_rank_linear(x: Tensor, y: Tensor, weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """y + scale (x Aᵀ) Bᵀ, where y = x Wᵀ + b is what a frozen linear layer made of x; y's memory is written to.

    The gradient of x goes through W and through B A in one buffer. Saved for backward are x (by reference, or what it
    is remade from), x Aᵀ and the two small factors; autograd's own graph behind `y` is not used: the caller drops it.

    Args:
        x: (…, in).
        y: (…, out), the layer's output; the result lies in its memory.
        weight_OI: the layer's frozen weight.
        a_RI: A, in any float dtype; cast to that of y.
        b_OR: B, likewise.
        scale: of the update.

    Example:
        >>> x, w, a, b = torch.randn(2, 3, 8), torch.randn(6, 8), torch.randn(4, 8), torch.randn(6, 4)
        >>> found = low_rank_linear(x, x @ w.T, w, a, b, 2.0)
        >>> torch.allclose(found, x @ (w + 2.0 * b @ a).T, atol=1e-5)
        True
    """
    made: Tensor = _LowRankLinear.apply(x, y.detach(), weight_OI, a_RI, b_OR, scale)  # type: ignore[no-untyped-call]
    return made


def _add_low_rank(y_TO: Tensor, x_TI: Tensor, down_RI: Tensor, up_RO: Tensor) -> Tensor:
    """y += (x Dᵀ) U in y's memory; gives x Dᵀ."""
    if launch.takes(y_TO, x_TI, down_RI, up_RO):
        from lorakit.kernels import triton_low_rank

        if triton_low_rank.fits(y_TO, x_TI, down_RI, up_RO):
            return triton_low_rank.add_low_rank(y_TO, x_TI, down_RI, up_RO)
    low_TR = product(x_TI, down_RI)
    y_TO.addmm_(low_TR, up_RO)
    return low_TR


class _LowRankLinear(torch.autograd.Function):
    """B is used as (R, O), the faster layout for thin products on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        small_RI, lift_RO = a_RI.to(y.dtype), (b_OR * scale).to(y.dtype).T.contiguous()
        low_TR = _add_low_rank(y_TO, x_TI, small_RI, lift_RO)
        ctx.remade, made_of = recipe(x)
        ctx.save_for_backward(low_TR, weight_OI, small_RI, lift_RO, *made_of)
        ctx.scale, ctx.dtypes = scale, (a_RI.dtype, b_OR.dtype)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        low_TR, weight_OI, small_RI, lift_RO, *made_of = ctx.saved_tensors
        wants_x, _, _, wants_a, wants_b, _ = ctx.needs_input_grad
        g_TO = gradient.reshape(-1, gradient.shape[-1])
        g_x = g_a = g_b = None
        if wants_x:
            g_x_TI = product(g_TO, weight_OI.T)
            g_TR = _add_low_rank(g_x_TI, g_TO, lift_RO, small_RI)
            g_x = g_x_TI.view(*gradient.shape[:-1], weight_OI.shape[1])
        else:
            g_TR = product(g_TO, lift_RO)
        if wants_a:
            x_TI = ctx.remade(*made_of).reshape(-1, small_RI.shape[1])
            g_a = over_tokens(g_TR, x_TI).to(ctx.dtypes[0])
        if wants_b:
            g_b = over_tokens(low_TR, g_TO).T.to(ctx.dtypes[1]) * ctx.scale
        return g_x, None, None, g_a, g_b, None
