"""LoRA-GA as its paper has it: begin along the loss's gradient (Wang et al. 2024, arXiv:2407.05000).

Legend: I in, O out, R rank.
"""

from __future__ import annotations

from torch import Tensor

from lorakit.core.statistics import SiteStatistics
from lorakit.inits._gradient import directions
from lorakit.inits._matrix import finished

NEEDS = frozenset({"gradient"})


def init(weight_OI: Tensor, rank: int, statistics: SiteStatistics | None = None) -> tuple[Tensor, Tensor]:
    """A = V[:R]ᵀ out^(1/4) / √γ and B = U[R:2R] out^(1/4) / √γ from the mean gradient G = U S Vᵀ.

    The size of the gradient does not matter, only its directions.

    >>> import torch
    >>> gradient_OI = torch.diag(torch.arange(16.0, 0.0, -1.0))
    >>> a_RI, b_OR = init(torch.zeros(16, 16), 1, SiteStatistics(shape=(16, 16), tokens=1, gradient_OI=gradient_OI))
    >>> a_RI[0, :3].tolist(), b_OR[:3, 0].tolist()
    ([0.5, 0.0, 0.0], [0.0, 0.5, 0.0])
    """
    v_RI, u_OR, _, scale = directions(weight_OI, rank, statistics)
    return finished(v_RI * scale, u_OR * scale)
