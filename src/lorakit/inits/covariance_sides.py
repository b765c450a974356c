"""Begin where both the layer's inputs and its outputs vary most; needs no loss.

EVA's choice on the input side, and its mirror image on the output side: the update begins in the span of the R
strongest directions of either.

Legend: I in, O out, R rank.
"""

from __future__ import annotations

from torch import Tensor

from lorakit.core.statistics import SiteStatistics, moment_of
from lorakit.inits._matrix import finished, precise, principal

NEEDS = frozenset({"inputs", "outputs"})


def init(weight_OI: Tensor, rank: int, statistics: SiteStatistics | None = None) -> tuple[Tensor, Tensor]:
    """A = the first R principal directions of the inputs as rows, B = those of the outputs as columns.

    >>> import torch
    >>> from lorakit.core.statistics import Moment
    >>> seen = Moment(9, torch.zeros(2), torch.diag(torch.tensor([1.0, 2.0])))
    >>> given = Moment(9, torch.zeros(2), torch.diag(torch.tensor([2.0, 1.0])))
    >>> statistics = SiteStatistics(shape=(2, 2), tokens=9, inputs=seen, outputs=given)
    >>> a_RI, b_OR = init(torch.zeros(2, 2), 1, statistics)
    >>> a_RI.tolist(), b_OR.tolist()
    ([[0.0, 1.0]], [[1.0], [0.0]])
    """
    seen, given = (moment_of(statistics, name, rank).covariance_DD for name in ("inputs", "outputs"))
    a_IR, b_OR = (principal(precise(each, weight_OI.device), rank) for each in (seen, given))
    return finished(a_IR.T, b_OR)
