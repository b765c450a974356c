"""EVA: begin where the layer's inputs vary most, and share ranks out by it (Paischer et al. 2024, arXiv:2410.07170).

Legend: I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.core.statistics import SiteStatistics, explained, moment_of
from lorakit.inits._matrix import finished, precise, principal

NEEDS = frozenset({"inputs"})
RHO = 2.0  # no site gets more than RHO times the rank that was asked for


def init(weight_OI: Tensor, rank: int, statistics: SiteStatistics | None = None) -> tuple[Tensor, Tensor]:
    """A = the first R principal directions of the inputs (orthonormal rows), B = 0.

    >>> from lorakit.core.statistics import Moment
    >>> seen = Moment(9, torch.zeros(3), torch.diag(torch.tensor([1.0, 6.0, 3.0])))
    >>> a_RI, b_OR = init(torch.zeros(2, 3), 1, SiteStatistics(shape=(2, 3), tokens=9, inputs=seen))
    >>> a_RI.tolist(), b_OR.tolist()
    ([[0.0, 1.0, 0.0]], [[0.0], [0.0]])
    """
    seen = moment_of(statistics, "inputs", rank)
    a_IR = principal(precise(seen.covariance_DD, weight_OI.device), rank)
    return finished(a_IR.T, torch.zeros(len(weight_OI), rank))


def ranks(statistics: Sequence[SiteStatistics], rank: int, rho: float = RHO) -> list[int]:
    """Ranks of all sites that together are `rank` a site, given to the directions that explain most; 0: leave it out.

    A site with more than `rank` directions of its own gets at most `rho` times `rank`. Its scale stays what `rank`
    makes it (EVA grows alpha with the rank). Sites with equal shares take turns, the earlier one first.

    >>> from lorakit.core.statistics import Moment
    >>> flat, steep = torch.eye(4), torch.diag(torch.tensor([97.0, 1.0, 1.0, 1.0]))
    >>> seen = [Moment(9, torch.zeros(4), covariance) for covariance in (flat, steep)]
    >>> ranks([SiteStatistics(shape=(4, 4), tokens=9, inputs=each) for each in seen], 2)
    [3, 1]
    """
    shares = [_shares(each, rank, rho) for each in statistics]
    offers = [(-share, order, site) for site, found in enumerate(shares) for order, share in enumerate(found)]
    given = [0] * len(shares)
    for _, _, site in sorted(offers)[: rank * len(shares)]:
        given[site] += 1
    return given


def _shares(statistics: SiteStatistics, rank: int, rho: float) -> list[float]:
    seen = moment_of(statistics, "inputs", rank)
    return explained(seen, min(round(rank * rho), seen.tokens - 1, *statistics.shape)).tolist()
