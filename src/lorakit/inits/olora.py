"""OLoRA: begin with an orthonormal basis of the weight's columns (Büyükakyüz 2024, arXiv:2406.01775).

Legend: I in, O out, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.statistics import SiteStatistics
from lorakit.inits._matrix import finished, usable


def init(weight_OI: Tensor, rank: int, statistics: SiteStatistics | None = None) -> tuple[Tensor, Tensor]:
    """A = R[:rank] and B = Q[:, :rank] from W = Q R; B's columns are orthonormal.

    >>> a_RI, b_OR = init(torch.tensor([[3.0, 10.0], [4.0, 5.0]]), 1)
    >>> (b_OR @ a_RI).round(decimals=4).tolist()
    [[3.0, 6.0], [4.0, 8.0]]
    """
    q_OK, r_KI = torch.linalg.qr(usable(weight_OI, rank))
    return finished(r_KI[:rank], q_OK[:, :rank])
