"""The product of a gate: act(e) · g, keeping e and g alone for backward.

Autograd keeps act(e) too. Whoever keeps the product itself for backward (a low-rank update of the next layer) need not:
it is made again from e and g.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels import launch
from lorakit.kernels.remade import remember

Activation = Literal["silu", "gelu", "gelu_tanh"]
_aten = torch.ops.aten
_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": _aten.silu_backward,
    "gelu": _aten.gelu_backward,
    "gelu_tanh": partial(_aten.gelu_backward, approximate="tanh"),
}


def gated(e: Tensor, g: Tensor, activation: Activation = "silu") -> Tensor:
    """act(e) · g (Shazeer 2020, https://arxiv.org/abs/2002.05202), of two tensors of one shape and dtype.

    Example:
        >>> e, g = torch.randn(3, 4), torch.randn(3, 4)
        >>> torch.allclose(gated(e, g), torch.nn.functional.silu(e) * g)
        True
    """
    product: Tensor = _Gated.apply(e, g, activation)  # type: ignore[no-untyped-call]
    return remember(product, partial(_product, activation=activation), e.detach(), g.detach())


def _product(e: Tensor, g: Tensor, activation: Activation) -> Tensor:
    if launch.takes(e, g) and e.shape == g.shape:
        from lorakit.kernels import triton_gated

        return triton_gated.product(e, g, activation)
    return _FORWARD[activation](e).mul_(g)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e: Tensor, g: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(e, g)
        ctx.activation = activation
        return _product(e, g, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        e, g = ctx.saved_tensors
        if launch.takes(gradient, e, g):
            from lorakit.kernels import triton_gated

            return *triton_gated.gradients(gradient, e, g, ctx.activation), None
        along_g = _FORWARD[ctx.activation](e).mul_(gradient)
        return _BACKWARD[ctx.activation](gradient * g, e), along_g, None
