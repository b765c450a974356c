"""`gated` on CUDA: forward and backward in one pass each, in float32, rounded once at the end.

Legend: T tokens (all leading dimensions in one), F width of the feed-forward layer.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.kernels.launch import launch, rows

_BLOCK = tl.constexpr(1024)  # numbers of a row for one program: 16 bytes a thread at half precision


def product(e: Tensor, g: Tensor, activation: str) -> Tensor:
    """act(e) · g, of two tensors of one shape and dtype."""
    e_TF, g_TF, out = rows(e), rows(g), torch.empty(e.shape, dtype=e.dtype, device=e.device)
    sizes = (e_TF.shape[1], e_TF.stride(0), g_TF.stride(0))
    launch(_product, _grid(e_TF), e_TF, g_TF, out, sizes, activation)
    return out


def gradients(gradient: Tensor, e: Tensor, g: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Those of e and of g, from that of their product."""
    gradient_TF, e_TF, g_TF = rows(gradient), rows(e), rows(g)
    to_e, to_g = (torch.empty(e.shape, dtype=e.dtype, device=e.device) for _ in range(2))
    sizes = (e_TF.shape[1], gradient_TF.stride(0), e_TF.stride(0), g_TF.stride(0))
    launch(_gradients, _grid(e_TF), gradient_TF, e_TF, g_TF, to_e, to_g, sizes, activation)
    return to_e, to_g


def _grid(x_TF: Tensor) -> tuple[int, int]:
    return len(x_TF), triton.cdiv(x_TF.shape[1], _BLOCK.value)


@triton.jit
def _product(e: tl.tensor, g: tl.tensor, out: tl.tensor, sizes: tl.tuple, activation: tl.constexpr) -> None:
    width, e_stride, g_stride = sizes
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    inside = column < width
    e_F = tl.load(e + row * e_stride + column, mask=inside, other=0.0).to(tl.float32)
    g_F = tl.load(g + row * g_stride + column, mask=inside, other=0.0).to(tl.float32)
    share_F, _ = _share(e_F, activation)
    tl.store(out + row * width + column, e_F * share_F * g_F, mask=inside)


@triton.jit
def _gradients(
    gradient: tl.tensor,
    e: tl.tensor,
    g: tl.tensor,
    to_e: tl.tensor,
    to_g: tl.tensor,
    sizes: tl.tuple,
    activation: tl.constexpr,
) -> None:
    width, gradient_stride, e_stride, g_stride = sizes
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    inside = column < width
    gradient_F = tl.load(gradient + row * gradient_stride + column, mask=inside, other=0.0).to(tl.float32)
    e_F = tl.load(e + row * e_stride + column, mask=inside, other=0.0).to(tl.float32)
    g_F = tl.load(g + row * g_stride + column, mask=inside, other=0.0).to(tl.float32)
    share_F, slope_F = _share(e_F, activation)
    tl.store(to_e + row * width + column, gradient_F * g_F * (share_F + e_F * slope_F), mask=inside)
    tl.store(to_g + row * width + column, gradient_F * e_F * share_F, mask=inside)


@triton.jit
def _share(e: tl.tensor, activation: tl.constexpr) -> tl.tuple:
    """act(e) / e, and its derivative."""
    if activation == "gelu":
        share = 0.5 + 0.5 * tl.erf(e * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * e * e)
    elif activation == "gelu_tanh":  # (1 + tanh u) / 2 is sigmoid(2 u)
        share = tl.sigmoid(1.5957691216057308 * (e + 0.044715 * e * e * e))
        slope = share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * e * e)
    else:
        tl.static_assert(activation == "silu")
        share = tl.sigmoid(e)
        slope = share * (1 - share)
    return share, slope
