"""Cross-entropy of a linear head, in chunks, with the gradient of its input made in the forward pass.

Legend: N positions, H hidden width, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.kernels import launch
from lorakit.kernels.product import product

CHUNK_ROWS = 256  # more cost memory and gain nothing


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    scale: float,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of softmax(h Wᵀ + b), and `scale` times its gradient with respect to h.

    The head is frozen, so dh = scale (p − t) W is all that backward needs: p is made once, in the logits' own memory,
    and no more than one chunk of logits is ever held. Log-sum-exp and p are float32 or wider whatever the dtype of h.

    Args:
        hidden_NH: what the head reads, any float dtype.
        weight_VH: the head's weight, on the same device.
        bias_V: its bias, if it has one.
        targets_N: int64, the right entry of the vocabulary for each position.
        scale: what the gradient is multiplied by, such as 1 / (labelled tokens of the step).
        smoothing: the share of the target's probability that is spread over the whole vocabulary.

    Returns:
        The sum of the losses (float32 or wider, not scaled), and the gradient (N, H) in the dtype of `hidden_NH`.

    Example:
        >>> hidden, weight, targets = torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 6, 2, 3, 3])
        >>> summed, _ = linear_cross_entropy(hidden, weight, None, targets, scale=1.0)
        >>> wanted = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
        >>> torch.allclose(summed, wanted)
        True
    """
    wide = torch.promote_types(hidden_NH.dtype, torch.float32)
    gradient_NH, summed = torch.empty_like(hidden_NH), hidden_NH.new_zeros((), dtype=wide)
    rows = min(CHUNK_ROWS, max(len(hidden_NH), 1))
    for start in range(0, len(hidden_NH), rows):
        part = slice(start, start + rows)
        loss, gradient_NH[part] = _chunk(hidden_NH[part], weight_VH, bias_V, targets_N[part], smoothing)
        summed += loss
    return summed, gradient_NH.mul_(scale)


def _chunk(
    hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_C: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """The summed loss, and (p − t) W."""
    loss, p_CV = _softmax_minus_targets(product(hidden_CH, weight_VH, bias_V), targets_C, smoothing)
    return loss, product(p_CV.to(weight_VH.dtype), weight_VH.T)


def _softmax_minus_targets(logits_CV: Tensor, targets_C: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The summed loss, and p − t in the memory of the logits where they are float32, or where Triton runs."""
    if launch.takes(logits_CV):
        from lorakit.kernels import triton_cross_entropy

        return triton_cross_entropy.softmax_minus_targets(logits_CV, targets_C, smoothing)
    z_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    at_C1 = targets_C[:, None]
    highest_C1, where_C1 = z_CV.max(1, keepdim=True)
    right_C1 = z_CV.gather(1, at_C1) * (1 - smoothing)
    if smoothing:
        right_C1 += z_CV.mean(1, keepdim=True) * smoothing
    p_CV = torch.softmax(z_CV, 1, out=z_CV)
    log_sum_C1 = highest_C1 - p_CV.gather(1, where_C1).log_()  # the largest p is never 0
    p_CV.scatter_add_(1, at_C1, torch.full_like(right_C1, smoothing - 1))
    if smoothing:
        p_CV -= smoothing / p_CV.shape[1]
    return (log_sum_C1 - right_C1).sum(), p_CV
