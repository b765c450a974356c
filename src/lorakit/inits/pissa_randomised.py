"""PiSSA with a randomised singular value decomposition: seconds where the exact one takes minutes.

Legend: I in, O out, R rank, K directions that are searched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.statistics import SiteStatistics
from lorakit.inits._matrix import halves, usable

SPLITS = True
ITERATIONS = 16  # of the power method; each sharpens the directions


def init(weight_OI: Tensor, rank: int, statistics: SiteStatistics | None = None) -> tuple[Tensor, Tensor]:
    """`pissa`, of directions found by power iterations on 2R random ones (Halko et al. 2011); draws random numbers.

    >>> a_RI, b_OR = init(torch.diag(torch.tensor([9.0, 4.0, 1.0])), 1)
    >>> (b_OR @ a_RI).abs().round(decimals=3).diag().tolist()
    [9.0, 0.0, 0.0]
    """
    w_OI = usable(weight_OI, rank)
    u_OK, s_K, v_IK = torch.svd_lowrank(w_OI, q=min(2 * rank, *w_OI.shape), niter=ITERATIONS)
    return halves(u_OK[:, :rank], s_K[:rank], v_IK[:, :rank].T)
