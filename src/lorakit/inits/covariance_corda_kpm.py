"""CorDA, knowledge-preserved: begin with what the data to be kept make least of (Yang et al. 2024, arXiv:2406.05223).

Legend: I in, O out.
"""

from __future__ import annotations

from torch import Tensor

from lorakit.core.statistics import SiteStatistics
from lorakit.inits._corda import oriented

NEEDS = frozenset({"inputs"})
SPLITS = True


def init(weight_OI: Tensor, rank: int, statistics: SiteStatistics | None = None) -> tuple[Tensor, Tensor]:
    """B A = the last R terms of W = U S (Vᵀ C⁻¹), where W C = U S Vᵀ; calibrate on what the model should not forget.

    >>> import torch
    >>> from lorakit.core.statistics import Moment
    >>> seen = Moment(9, torch.zeros(2), torch.diag(torch.tensor([1.0, 100.0])))
    >>> a_RI, b_OR = init(torch.diag(torch.tensor([5.0, 3.0])), 1, SiteStatistics(shape=(2, 2), tokens=9, inputs=seen))
    >>> (b_OR @ a_RI).round(decimals=4).diag().tolist()
    [5.0, 0.0]
    """
    return oriented(weight_OI, rank, statistics, last=True)
