"""`low_rank` on CUDA: the low-rank product is made and added in one kernel, which reads x once and y once.

The layer's own products stay cuBLAS's.

Legend: T tokens (all leading dimensions in one), I in, O out, R rank.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.kernels.launch import launch

_MOST_RANK = 128  # beyond it the thin products are no longer thin
_TOKENS = 32  # of one program


def fits(y_TO: Tensor, x_TI: Tensor, down_RI: Tensor, up_RO: Tensor) -> bool:
    """Whether the kernel is for these: one dtype of half precision, rows in one piece, a rank of at most 128."""
    dtypes = {tensor.dtype for tensor in (y_TO, x_TI, down_RI, up_RO)}
    in_rows = y_TO.stride(1) == x_TI.stride(1) == 1 and down_RI.is_contiguous() and up_RO.is_contiguous()
    return in_rows and dtypes in ({torch.bfloat16}, {torch.float16}) and len(down_RI) <= _MOST_RANK


def add_low_rank(y_TO: Tensor, x_TI: Tensor, down_RI: Tensor, up_RO: Tensor) -> Tensor:
    """y += (x Dᵀ) U in y's memory, of four that fit; gives x Dᵀ. Sums are float32, x Dᵀ is rounded before U."""
    low_TR = x_TI.new_empty(len(x_TI), len(down_RI))
    rank = max(16, triton.next_power_of_2(len(down_RI)))
    width = 128 if rank <= 32 else 64  # what is in flight fits the smallest shared memory
    programs = triton.cdiv(len(x_TI), _TOKENS)
    # Few tokens leave multiprocessors idle: then several programs make the same x Dᵀ and share out the columns of y.
    shares = min(triton.cdiv(_processors(x_TI.device), max(programs, 1)), triton.cdiv(y_TO.shape[1], width))
    sizes = (*x_TI.shape, *up_RO.T.shape, x_TI.stride(0), y_TO.stride(0))
    launch(_add, (programs, shares), y_TO, x_TI, down_RI, up_RO, low_TR, sizes, (_TOKENS, rank, width))
    return low_TR


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _add(
    y: tl.tensor, x: tl.tensor, down: tl.tensor, up: tl.tensor, low: tl.tensor, sizes: tl.tuple, blocks: tl.constexpr
) -> None:
    tokens, width_in, width_out, rank, x_stride, y_stride = sizes
    BLOCK_T: tl.constexpr = blocks[0]
    BLOCK_R: tl.constexpr = blocks[1]
    BLOCK: tl.constexpr = blocks[2]
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    x, y, low = x + first * x_stride, y + first * y_stride, low + first * rank
    t_T1, r = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_R)
    r_1R, r_R1, there_T1 = r[None, :], r[:, None], t_T1 < tokens - first
    low_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, width_in, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x_TI = tl.load(x + t_T1 * x_stride + i[None, :], mask=there_T1 & (i[None, :] < width_in), other=0.0)
        in_down = (r_1R < rank) & (i[:, None] < width_in)
        down_IR = tl.load(down + r_1R * width_in + i[:, None], mask=in_down, other=0.0)
        low_TR = tl.dot(x_TI, down_IR, low_TR)
    rounded_TR = low_TR.to(x.dtype.element_ty)
    if tl.program_id(1) == 0:
        tl.store(low + t_T1 * rank + r_1R, rounded_TR, mask=there_T1 & (r_1R < rank))
    for start in range(tl.program_id(1) * BLOCK, width_out, tl.num_programs(1) * BLOCK):
        o = start + tl.arange(0, BLOCK)
        in_y = there_T1 & (o[None, :] < width_out)
        y_TO = tl.load(y + t_T1 * y_stride + o[None, :], mask=in_y, other=0.0)
        in_up = (r_R1 < rank) & (o[None, :] < width_out)
        up_RO = tl.load(up + r_R1 * width_out + o[None, :], mask=in_up, other=0.0)
        tl.store(y + t_T1 * y_stride + o[None, :], tl.dot(rounded_TR, up_RO, y_TO.to(tl.float32)), mask=in_y)
