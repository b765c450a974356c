"""loralib's initialisation: A uniform on ±1/sqrt(in) (Kaiming with a = sqrt 5), B zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor

RANDOM = True


def init(weight_OI: Tensor, rank: int, statistics: object) -> tuple[Tensor, Tensor]:
    """A (rank, in) from U(-1/sqrt(in), 1/sqrt(in)), B (out, rank) zero, both float32.

    >>> a_RI, b_OR = init(torch.zeros(6, 4), 2, None)
    >>> bool(a_RI.abs().max() <= 0.5), float(b_OR.abs().sum())
    (True, 0.0)
    """
    out_features, in_features = weight_OI.shape
    bound = 1 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound), torch.zeros(out_features, rank)
