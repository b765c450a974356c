"""Intruder dimensions: strong directions of W + ΔW that W never had (Shuttleworth et al. 2024, arXiv:2410.21228).

Legend: I in, O out, K directions of W + ΔW that are looked at, N directions of W that are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lorakit.analyse.randomised import EXACT, Weight, blocks, top
from lorakit.analyse.subspace import Pair
from lorakit.core.exchange import Factored

LOOKED_AT: Final = 10  # of the strongest directions; this and ε as in PEFT's reduce_intruder_dimension
THRESHOLD: Final = 0.5  # the paper's ε
KNOWN: Final = 128  # of W's directions, where it is too large to know all


@dataclass(frozen=True, eq=False)
class Intruders:
    """How like each of the strongest left singular directions of W + ΔW is to that of W which it is most like."""

    values_K: Tensor  # their singular values
    cosines_K: Tensor  # the largest |cosine| with a known direction of W
    bounds_K: Tensor  # what it is at most with any; the same where all are known
    threshold: float

    @property
    def certain(self) -> list[int]:
        """Which of the strongest directions are intruders, counted from 0."""
        return torch.nonzero(self.bounds_K < self.threshold).flatten().tolist()

    @property
    def possible(self) -> list[int]:
        """Which may be: the certain ones, and those that may be like a direction of W that is not known."""
        return torch.nonzero(self.cosines_K < self.threshold).flatten().tolist()


def intruders(
    weight: Weight,
    update: Factored | Pair,
    *,
    count: int = LOOKED_AT,
    threshold: float = THRESHOLD,
    known: int = KNOWN,
    exact: int = EXACT,
) -> Intruders:
    """The `count` strongest left singular directions of W + ΔW, and how like they are to W's own.

    All of W's directions are known where its smaller side is at most `exact`. Of a larger weight the `known` strongest
    are found by `top`, as precisely as it finds them, and a direction has with any other a cosine of at most
    sqrt(1 - Σ cos²) over the known ones.

    Raises:
        NotComparable: an update of another shape than the weight, too many directions, or NaN.

    >>> strong_new = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0], [4.0], [4.0]])
    >>> found = intruders(torch.diag(torch.tensor([3.0, 2.0, 1.0])), strong_new, count=3, threshold=0.9)
    >>> found.certain, found.cosines_K.round(decimals=2).tolist()
    ([0, 2], [0.75, 1.0, 0.75])
    """
    base, changed = blocks(weight), blocks(weight, plus=update)
    side = min(base.shape)
    own = top(base, side if side <= exact else min(known, side), exact=exact)
    new = top(changed, min(count, side), exact=exact)
    cosines_KN = new.left_OR.T @ own.left_OR
    best_K = cosines_KN.abs().max(1).values
    rest_K = (1 - cosines_KN.square().sum(1)).clamp(min=0).sqrt()
    bounds_K = best_K if len(own.values_R) == side else torch.maximum(best_K, rest_K)
    return Intruders(new.values_R, best_K, bounds_K, threshold)
