"""The paper's initialisation: A Gaussian, B zero (Hu et al. 2021, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

STD = 0.02  # the paper gives none; its released GPT-2 code draws from N(0, 0.02^2)

RANDOM = True


def init(weight_OI: Tensor, rank: int, statistics: object) -> tuple[Tensor, Tensor]:
    """A (rank, in) from N(0, 0.02^2), B (out, rank) zero, both float32.

    >>> a_RI, b_OR = init(torch.zeros(6, 4), 2, None)
    >>> a_RI.shape, b_OR.shape, float(b_OR.abs().sum())
    (torch.Size([2, 4]), torch.Size([6, 2]), 0.0)
    """
    out_features, in_features = weight_OI.shape
    return torch.randn(rank, in_features) * STD, torch.zeros(out_features, rank)
