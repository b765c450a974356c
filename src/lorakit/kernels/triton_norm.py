"""`norm` on CUDA: a row is read once in forward and once in backward.

Legend: T tokens (all leading dimensions in one), H hidden width.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.kernels.launch import launch, rows

_LEAST = 1024  # numbers of one program: several rows share one where they are short, as those of attention heads


def normed(x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """w · x / sqrt(mean(x²) + eps), and the inverse root (…, 1) in float32."""
    inverse = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    return _launch_normed(x, weight_H, inverse, eps), inverse


def normed_again(x: Tensor, weight_H: Tensor, inverse: Tensor) -> Tensor:
    """The same, from the inverse root."""
    return _launch_normed(x, weight_H, inverse, None)


def _launch_normed(x: Tensor, weight_H: Tensor, inverse: Tensor, eps: float | None) -> Tensor:
    x_TH, out = rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = (*x_TH.shape, x_TH.stride(0))
    _launch(_normed, x_TH, weight_H.contiguous(), inverse, out, sizes, eps)
    return out


def gradient_of_x(gradient: Tensor, x: Tensor, weight_H: Tensor, inverse: Tensor) -> Tensor:
    """That of x, from that of what `normed` gave."""
    x_TH, gradient_TH, out = rows(x), rows(gradient), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = (*x_TH.shape, x_TH.stride(0), gradient_TH.stride(0))
    _launch(_gradient, x_TH, weight_H.contiguous(), inverse, out, gradient_TH, sizes)
    return out


def _launch(kernel: Any, x_TH: Tensor, *arguments: Any) -> None:
    width = triton.next_power_of_2(x_TH.shape[1])
    tile = (max(1, _LEAST // width), width)
    warps = min(16, max(4, width // 512))
    launch(kernel, (triton.cdiv(len(x_TH), tile[0]),), x_TH, *arguments, tile, num_warps=warps)


@triton.jit
def _places(tokens: tl.tensor, width: tl.tensor, tile: tl.constexpr) -> Any:
    """The rows and columns of this program, and which of them there are."""
    ROWS: tl.constexpr = tile[0]
    BLOCK: tl.constexpr = tile[1]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    return row, column, (row < tokens) & (column < width)


@triton.jit
def _normed(
    x: tl.tensor,
    weight: tl.tensor,
    inverse: tl.tensor,
    out: tl.tensor,
    sizes: tl.tuple,
    eps: tl.tensor,
    tile: tl.constexpr,
) -> None:
    """Without eps, the inverse root is read and not made."""
    tokens, width, stride = sizes
    row, column, inside = _places(tokens, width, tile)
    x_TH = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    weight_H = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    if eps is None:
        inverse_T1 = tl.load(inverse + row, mask=row < tokens, other=0.0)
    else:
        inverse_T1 = tl.rsqrt(tl.sum(x_TH * x_TH, 1, keep_dims=True) / width + eps)
        tl.store(inverse + row, inverse_T1, mask=row < tokens)
    rounded_TH = (x_TH * inverse_T1).to(x.dtype.element_ty).to(tl.float32)  # as the plain twin, before it meets w
    tl.store(out + row * width + column, rounded_TH * weight_H, mask=inside)


@triton.jit
def _gradient(
    x: tl.tensor,
    weight: tl.tensor,
    inverse: tl.tensor,
    out: tl.tensor,
    gradient: tl.tensor,
    sizes: tl.tuple,
    tile: tl.constexpr,
) -> None:
    tokens, width, stride, gradient_stride = sizes
    row, column, inside = _places(tokens, width, tile)
    x_TH = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    weight_H = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    weighted_TH = tl.load(gradient + row * gradient_stride + column, mask=inside, other=0.0).to(tl.float32) * weight_H
    inverse_T1 = tl.load(inverse + row, mask=row < tokens, other=0.0)
    along_T1 = tl.sum(weighted_TH * x_TH, 1, keep_dims=True) * inverse_T1 * inverse_T1 / width
    tl.store(out + row * width + column, (weighted_TH - x_TH * along_T1) * inverse_T1, mask=inside)
