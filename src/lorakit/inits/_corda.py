"""CorDA's decomposition, shared by its two modes.

Legend: I in, O out, K the smaller side, R rank.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from lorakit.core.statistics import SiteStatistics, moment_of
from lorakit.inits._matrix import damped, halves, precise, svd, usable

DAMPING: Final = 0.01  # share of the mean variance that is added to every direction


def oriented(weight_OI: Tensor, rank: int, statistics: SiteStatistics | None, *, last: bool) -> tuple[Tensor, Tensor]:
    """The first or last R terms of W = U S (Vᵀ C⁻¹), from W C = U S Vᵀ and C = E[x xᵀ] damped, split between A and B.

    C is divided by its mean diagonal, so that A and B are of the weight's size; B A does not depend on it. CorDA (and
    PEFT) normalise by the largest activation of each batch, and double the damping where float32 cannot invert C.
    """
    w_OI = precise(usable(weight_OI, rank), weight_OI.device)
    c_II = damped(precise(moment_of(statistics, "inputs", rank).second, weight_OI.device), DAMPING)
    c_II = c_II / c_II.diagonal().mean()
    u_OK, s_K, v_KI = svd(w_OI @ c_II)
    some = slice(len(s_K) - rank, None) if last else slice(rank)
    return halves(u_OK[:, some], s_K[some], torch.linalg.solve(c_II, v_KI[some], left=False))
