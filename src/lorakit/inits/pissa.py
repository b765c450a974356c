"""PiSSA: begin with the principal part of the weight, and train it (Meng et al. 2024, arXiv:2404.02948).

Legend: I in, O out, R rank.
"""

from __future__ import annotations

from torch import Tensor

from lorakit.core.statistics import SiteStatistics
from lorakit.inits._matrix import halves, svd, usable

SPLITS = True


def init(weight_OI: Tensor, rank: int, statistics: SiteStatistics | None = None) -> tuple[Tensor, Tensor]:
    """A = √S_R V_Rᵀ and B = U_R √S_R from W = U S Vᵀ, so that B A is the best rank-R approximation of W.

    >>> import torch
    >>> a_RI, b_OR = init(torch.diag(torch.tensor([9.0, 4.0, 1.0])), 2)
    >>> (b_OR @ a_RI).round(decimals=4).diag().tolist()
    [9.0, 4.0, 0.0]
    """
    u_OK, s_K, v_KI = svd(usable(weight_OI, rank))
    return halves(u_OK[:, :rank], s_K[:rank], v_KI[:rank])
