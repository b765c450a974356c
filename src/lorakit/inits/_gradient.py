"""Directions of the loss's gradient, shared by the two forms of LoRA-GA.

Legend: I in, O out, R rank.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from lorakit.core.statistics import SiteStatistics, gradient_of
from lorakit.errors import BadMethod
from lorakit.inits._matrix import svd, usable

GAMMA: Final = 16.0  # the paper's γ: the larger, the smaller the factors


def directions(weight_OI: Tensor, rank: int, statistics: SiteStatistics | None) -> tuple[Tensor, Tensor, Tensor, float]:
    """The first R right singular vectors of G, the next R left ones with their values, and out^(1/4) / √γ.

    Raises:
        BadMethod: no gradient, or fewer than 2R directions in it.
    """
    gradient_OI = gradient_of(statistics)
    if 2 * rank > min(weight_OI.shape):
        raise BadMethod(
            f"it takes {2 * rank} directions of a matrix {tuple(weight_OI.shape)}; "
            f"the largest rank there is {min(weight_OI.shape) // 2}"
        )
    u_OK, s_K, v_KI = svd(usable(gradient_OI, rank).to(weight_OI.device))
    return v_KI[:rank], u_OK[:, rank : 2 * rank], s_K[rank : 2 * rank], len(u_OK) ** 0.25 / GAMMA**0.5
