"""Random factors in orthogonal halves of the R channels: both are non-zero and B A is zero.

From "Rethinking LoRA initialisation", https://datta0.github.io/posts/rethink-lora-init/.

Legend: I in, O out, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.statistics import SiteStatistics
from lorakit.errors import BadMethod
from lorakit.inits._matrix import finished

STD = 0.1


def init(weight_OI: Tensor, rank: int, statistics: SiteStatistics | None = None) -> tuple[Tensor, Tensor]:
    """A = Q₁ᵀ X / 10 and B = Y Q₂ / 10, with Q₁ and Q₂ the odd and even rows of an orthogonal Q (R, R).

    X (R/2, in) and Y (out, R/2) are Gaussian.

    >>> a_RI, b_OR = init(torch.zeros(6, 4), 2)
    >>> float((b_OR @ a_RI).abs().max()) < 1e-6 < float(b_OR.abs().max())
    True
    """
    if rank % 2:
        raise BadMethod(f"it halves the rank, so the rank has to be even, not {rank}")
    outs, ins = weight_OI.shape
    q_RR = torch.linalg.qr(torch.randn(rank, rank))[0]
    a_IR = torch.randn(ins, rank // 2) @ q_RR[0::2]
    b_OR = torch.randn(rank // 2, outs).T @ q_RR[1::2]
    return finished(a_IR.T * STD, b_OR * STD)
