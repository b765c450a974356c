"""Begin with the part of the weight that the loss feels most, by second moments of both sides.

To second order, and with the Kronecker-factored curvature of K-FAC (Martens and Grosse 2015, arXiv:1503.05671), a
change Δ of W costs ½ tr(D Δ S Δᵀ) = ½ ‖L_Dᵀ Δ L_S‖_F², where S = E[x xᵀ] = L_S L_Sᵀ is the second moment of the layer's
inputs and D = E[δ δᵀ] = L_D L_Dᵀ that of the gradients at its output. This initialisation is `pissa` in that metric.
(The moment of the outputs themselves would not serve: it is W S Wᵀ, which tells nothing beyond W and S.)

Legend: I in, O out, K the smaller side, R rank.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from lorakit.core.statistics import SiteStatistics, moment_of
from lorakit.inits._matrix import damped, halves, precise, svd, usable

NEEDS = frozenset({"inputs", "errors"})
SPLITS = True
DAMPING: Final = 0.01  # share of the mean variance that is added to every direction, on both sides


def init(weight_OI: Tensor, rank: int, statistics: SiteStatistics | None = None) -> tuple[Tensor, Tensor]:
    """B = L_D⁻ᵀ U_R √Σ_R and A = √Σ_R V_Rᵀ L_S⁻¹ from L_Dᵀ W L_S = U Σ Vᵀ.

    B A is the rank-R matrix nearest to W in the metric above. Both moments are divided by their mean diagonal, which
    changes how the size is split between A and B but not B A.

    >>> from lorakit.core.statistics import Moment
    >>> seen = Moment(9, torch.zeros(2), torch.eye(2))
    >>> felt = Moment(9, torch.zeros(2), torch.diag(torch.tensor([1.0, 100.0])))
    >>> statistics = SiteStatistics(shape=(2, 2), tokens=9, inputs=seen, errors=felt)
    >>> a_RI, b_OR = init(torch.diag(torch.tensor([5.0, 3.0])), 1, statistics)
    >>> (b_OR @ a_RI).round(decimals=4).diag().tolist()
    [0.0, 3.0]
    """
    w_OI = precise(usable(weight_OI, rank), weight_OI.device)
    s_II, d_OO = (_root(statistics, name, rank, weight_OI.device) for name in ("inputs", "errors"))
    u_OK, sigma_K, v_KI = svd(d_OO.T @ w_OI @ s_II)
    left_OR = torch.linalg.solve_triangular(d_OO.T, u_OK[:, :rank], upper=True)
    right_RI = torch.linalg.solve_triangular(s_II, v_KI[:rank], upper=False, left=False)
    return halves(left_OR, sigma_K[:rank], right_RI)


def _root(statistics: SiteStatistics | None, name: str, rank: int, device: torch.device) -> Tensor:
    """The Cholesky factor of a damped second moment of mean diagonal 1."""
    moment = damped(precise(moment_of(statistics, name, rank).second, device), DAMPING)
    return torch.linalg.cholesky(moment / moment.diagonal().mean())
