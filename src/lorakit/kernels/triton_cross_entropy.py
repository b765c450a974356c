"""`cross_entropy` on CUDA: a row of logits becomes its loss and p − t, in the logits' own memory.

Legend: C rows of a chunk, V vocabulary.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.kernels.launch import launch, rows

_BLOCK = 16384  # logits at a time
_WARPS = 16 if torch.version.hip else 32  # a row: few rows at a time stay in the cache for their second reading


def softmax_minus_targets(logits_CV: Tensor, targets_C: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The summed loss (float32) and p − t in the dtype and the memory of the logits.

    A target outside the vocabulary makes the loss NaN.
    """
    logits_CV, losses_C = rows(logits_CV), torch.empty(len(logits_CV), dtype=torch.float32, device=logits_CV.device)
    sizes = (logits_CV.stride(0), logits_CV.shape[1])
    block = min(_BLOCK, triton.next_power_of_2(sizes[1]))
    warps = min(_WARPS, max(4, block // 512))
    tensors = (logits_CV, targets_C.contiguous(), losses_C)
    launch(_row, (len(logits_CV),), *tensors, sizes, float(smoothing), block, num_warps=warps)
    return losses_C.sum(), logits_CV


@triton.jit
def _row(
    logits: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    sizes: tl.tuple,
    smoothing: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    stride, vocabulary = sizes
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocabulary)
    right = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
    highest = -3.4e38  # finite, so that a block of −inf adds exp(−inf) = 0 and not NaN
    summed = 0.0
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z_V = tl.load(logits + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
        before = highest
        highest = tl.maximum(highest, tl.max(z_V, 0))
        summed = summed * tl.exp(before - highest) + tl.sum(tl.exp(z_V - highest), 0)
        if smoothing > 0:
            total += tl.sum(tl.where(column < vocabulary, z_V, 0.0), 0)
    log_sum = highest + tl.log(summed)
    tl.store(losses + row, log_sum - (1 - smoothing) * right - smoothing * total / vocabulary)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z_V = tl.load(logits + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
        p_V = tl.exp(z_V - log_sum) - smoothing / vocabulary
        tl.store(logits + column, tl.where(column == target, p_V - (1 - smoothing), p_V), mask=column < vocabulary)
