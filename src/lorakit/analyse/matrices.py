"""An update as what is wanted, thin or dense: its norm, its nearest factors of a rank, and how far factors are from it.

Legend: I in, O out, R rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from lorakit.analyse.randomised import top
from lorakit.analyse.subspace import Pair, directions

_ROUNDING: Final = 1e-13  # of ‖A‖ ‖B‖: what is left of float64 products that cancel


class Wanted(ABC):
    """A matrix (O, I) that factors are to come near to."""

    @property
    @abstractmethod
    def norm(self) -> float:
        """Its Frobenius norm."""

    @abstractmethod
    def distance(self, a_RI: Tensor, b_OR: Tensor) -> float:
        """‖· - B A‖_F."""

    @abstractmethod
    def nearest(self, rank: int) -> Pair:
        """Factors of this rank, or of the matrix's own where that is less: A = √S Vᵀ and B = U √S of its largest S."""


@final
@dataclass(frozen=True, eq=False)
class Thin(Wanted):
    """B A, never multiplied out.

    >>> twice = Thin(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.ones(3, 2))
    >>> [tuple(each.shape) for each in twice.nearest(2)]
    [(1, 2), (3, 1)]
    """

    a_RI: Tensor
    b_OR: Tensor

    @property
    def norm(self) -> float:
        inner_RR, outer_RR = (torch.linalg.qr(thin, mode="r")[1] for thin in (self.a_RI.double().T, self.b_OR.double()))
        norm, parts = float((outer_RR @ inner_RR.T).norm()), float(inner_RR.norm() * outer_RR.norm())
        return norm if norm > _ROUNDING * parts else 0.0

    def distance(self, a_RI: Tensor, b_OR: Tensor) -> float:
        a_RI, b_OR = a_RI.double(), b_OR.double()
        return Thin(torch.cat([self.a_RI.double(), a_RI]), torch.cat([self.b_OR.double(), -b_OR], 1)).norm

    def nearest(self, rank: int) -> Pair:
        if not self.norm:
            return self.a_RI[:0], self.b_OR[:, :0]
        own = self.narrow()
        found = directions((own.a_RI, own.b_OR))
        return _balanced(found.left_OR[:, :rank], found.values_R[:rank], found.right_IR[:, :rank])

    def narrow(self) -> Thin:
        """The same with no more rank than its matrix can have."""
        out, inner = len(self.b_OR), self.a_RI.shape[1]
        if len(self.a_RI) <= min(out, inner):
            return self
        whole_OI = self.b_OR @ self.a_RI
        eye = torch.eye(min(out, inner), dtype=whole_OI.dtype)
        return Thin(eye, whole_OI) if inner <= out else Thin(whole_OI, eye)


@final
@dataclass(frozen=True, eq=False)
class Dense(Wanted):
    """A matrix that is no product of thin factors; where it is large, its nearest factors are found by random trial."""

    whole_OI: Tensor

    @property
    def norm(self) -> float:
        return float(torch.linalg.vector_norm(self.whole_OI, dtype=torch.float64))

    def distance(self, a_RI: Tensor, b_OR: Tensor) -> float:
        return Dense(torch.addmm(self.whole_OI, b_OR.to(self.whole_OI), a_RI.to(self.whole_OI), alpha=-1)).norm

    def nearest(self, rank: int) -> Pair:
        found = top(self.whole_OI, min(rank, *self.whole_OI.shape))
        return _balanced(found.left_OR, found.values_R, found.right_IR)


def _balanced(left_OR: Tensor, values_R: Tensor, right_IR: Tensor) -> Pair:
    root_R = values_R.sqrt()
    return (right_IR * root_R).T, left_OR * root_R


@dataclass(frozen=True)
class Fit:
    """The norm of what was wanted, and its distance from the factors that stand for it."""

    norm: float
    distance: float


def fit(wanted: Wanted, factors: Pair, dtype: torch.dtype) -> tuple[Pair, Fit]:
    """Factors as a file of this dtype will hold them, and how well they fit then."""
    a_RI, b_OR = (factor.to(dtype) for factor in factors)
    return (a_RI, b_OR), Fit(wanted.norm, wanted.distance(a_RI, b_OR))


def lost(fits: Collection[Fit]) -> float:
    """‖· - B A‖_F / ‖·‖_F of several matrices together; 0 where all that was wanted is zero, and is found so."""
    distance = math.hypot(*(each.distance for each in fits))
    return distance / math.hypot(*(each.norm for each in fits)) if distance else 0.0
