"""Begin with smooth and sparse directions of the layer's inputs, smooth along the channels' index.

`structured` with another geometry, for inputs whose order means something: positions, frequencies, rotary pairs.

Legend: I in, O out, R rank.
"""

from __future__ import annotations

from torch import Tensor

from lorakit.core.statistics import SiteStatistics
from lorakit.inits import structured
from lorakit.inits._geometry import line

NEEDS = structured.NEEDS


def init(weight_OI: Tensor, rank: int, statistics: SiteStatistics | None = None) -> tuple[Tensor, Tensor]:
    """A = Φᵀ (orthonormal rows), B = 0; rough is what a cubic spline through the channels' index bends."""
    return structured.init(weight_OI, rank, statistics, geometry=line)
