"""Begin with smooth and sparse directions of the layer's inputs, smooth over the graph of their correlations.

SpatPCA (Wang and Huang 2017, arXiv:1501.03221) on activations. Hidden channels have no natural order, so smooth means:
channels that correlate have similar entries. `structured-line` takes the channels' index instead. How smooth and how
sparse is chosen by cross-validation over whole sequences; it takes some forty eigendecompositions of a
matrix (in, in), so minutes a layer where it is 2,000 wide.

Legend: I in, O out, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.statistics import SiteStatistics, moment_of, not_gathered
from lorakit.errors import BadMethod
from lorakit.inits._geometry import Geometry, graph
from lorakit.inits._matrix import finished
from lorakit.inits._spatial import components, cross_validated, problem

NEEDS = frozenset({"inputs", "folds"})


def init(
    weight_OI: Tensor, rank: int, statistics: SiteStatistics | None = None, geometry: Geometry = graph
) -> tuple[Tensor, Tensor]:
    """A = Φᵀ (orthonormal rows), B = 0, where Φ holds the R smooth and sparse components of the inputs.

    >>> from lorakit.core.statistics import Moment, merged
    >>> parts = tuple(Moment(5, torch.zeros(4), torch.diag(torch.tensor([9.0, 8.0, 1.0, part]))) for part in (1.0, 2.0))
    >>> statistics = SiteStatistics(shape=(3, 4), tokens=10, inputs=merged(parts), folds=parts)
    >>> a_RI, b_OR = init(torch.zeros(3, 4), 2, statistics)
    >>> bool(torch.allclose(a_RI @ a_RI.T, torch.eye(2), atol=1e-5)), float(b_OR.abs().sum())
    (True, 0.0)
    """
    if statistics is None or not statistics.folds:
        raise not_gathered("folds")
    if rank > weight_OI.shape[1]:
        raise BadMethod(f"rank {rank} is above the layer's {weight_OI.shape[1]} inputs; take a smaller rank")
    covariance_II = moment_of(statistics, "inputs", rank).covariance_DD.double()
    given = problem(statistics.folds, geometry(covariance_II), weight_OI.device)
    phi_IR = components(given.moment_DD, given.roughness_DD, rank, *cross_validated(given, rank))
    return finished(phi_IR.T, torch.zeros(len(weight_OI), rank))
