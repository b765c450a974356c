"""How many directions a matrix has, and how many of them matter: ranks, norms and what of the rank is wasted.

Legend: I in, O out, R rank, L layers, T roles.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Protocol, TypeVar

import torch
from torch import Tensor

from lorakit.analyse.subspace import factors
from lorakit.core.exchange import Factored
from lorakit.errors import NotComparable

KEPT: Final = 0.99  # of ‖ΔW‖_F²: what a rank must keep, or it is wasted
EPSILON: Final = torch.finfo(torch.float32).eps  # of the numbers in which updates and weights are held


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What the singular values of one update tell, the scale included."""

    name: str
    path: str
    role: str
    layer: int | None
    shape: tuple[int, int]  # (out, in)
    values_R: Tensor  # all R, the largest first, in float64
    dead: bool  # ΔW is zero, exactly or but for rounding

    @property
    def rank(self) -> int:
        """R, which the adapter pays for."""
        return len(self.values_R)

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return float(self.values_R.norm())

    @property
    def stable(self) -> float:
        """Its `stable_rank`."""
        return stable_rank(self.values_R)

    @property
    def effective(self) -> float:
        """Its `effective_rank`."""
        return effective_rank(self.values_R)

    @property
    def numerical(self) -> int:
        """Its `numerical_rank`."""
        return numerical_rank(self.values_R, self.shape)

    @property
    def wasted(self) -> int:
        """By how much the rank exceeds the smallest that keeps 99 % of ‖ΔW‖_F²."""
        return self.rank - smallest_rank(self.values_R, KEPT)


def spectra(updates: Iterable[Factored]) -> list[Spectrum]:
    """The spectrum of each update, read one at a time; no matrix (out, in) is formed.

    Raises:
        NotComparable: factors that are not finite, or of a rank above the matrix.
        BadAdapterFile: the file's values are not finite.

    >>> read = lambda: (torch.tensor([[0.6, 0.8], [0.8, -0.6]]), torch.diag(torch.tensor([4.0, 0.1])))
    >>> [found] = spectra([Factored("x", "layers.0.x", "x", 0, 2, (2, 2), read)])
    >>> found.values_R.float().tolist(), found.rank, found.wasted, found.dead
    ([4.0, 0.10000000149011612], 2, 1, False)
    """
    return [_spectrum(update) for update in updates]


def _spectrum(update: Factored) -> Spectrum:
    a_RI, b_OR = factors(update)
    inner_RR, outer_RR = (torch.linalg.qr(thin, mode="r")[1] for thin in (a_RI.T, b_OR))
    values_R = torch.linalg.svdvals(outer_RR @ inner_RR.T)
    dead = bool(values_R.norm() <= EPSILON * a_RI.norm() * b_OR.norm())
    return Spectrum(update.name, update.path, update.role, update.layer, update.shape, values_R, dead)


def stable_rank(values_R: Tensor) -> float:
    """‖·‖_F² / σ₁² of singular values, 0 of a zero matrix: how many directions are as strong as the strongest.

    >>> stable_rank(torch.tensor([2.0, 2.0, 1.0]))
    2.25
    """
    top = float(values_R.max())
    return float((values_R.double() / top).square().sum()) if top > 0 else 0.0


def effective_rank(values_R: Tensor) -> float:
    """exp of the entropy of σ / Σσ, 0 of a zero matrix (Roy and Vetterli 2007): how evenly directions are used.

    >>> round(effective_rank(torch.tensor([5.0, 5.0, 5.0, 0.0])), 9)
    3.0
    """
    total = float(values_R.double().sum())
    return math.exp(float(torch.special.entr(values_R.double() / total).sum())) if total > 0 else 0.0


def numerical_rank(values_R: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
    """How many σ exceed σ₁ max(shape) eps: what a matrix (out, in) held in `dtype` can tell from rounding.

    >>> numerical_rank(torch.tensor([1.0, 1e-3, 1e-9]), (100, 100))
    2
    """
    return int((values_R > values_R.max() * max(shape) * torch.finfo(dtype).eps).sum())


def smallest_rank(values_R: Tensor, share: float) -> int:
    """The smallest rank whose best approximation keeps this share of ‖·‖_F², the squared Frobenius norm.

    Its relative error is at most sqrt(1 - share): 10 % in norm where 99 % are kept. A zero matrix needs none.

    Raises:
        NotComparable: a share that is not above 0 and at most 1.

    >>> [smallest_rank(torch.tensor([3.0, 1.0, 0.1]), share) for share in (0.89, 0.99, 1.0)]
    [1, 2, 3]
    """
    if not 0 < share <= 1:
        raise NotComparable(f"a rank cannot keep {share:g} of an update; give a share above 0 and at most 1")
    kept_R = values_R.double().square().cumsum(0)
    return int((kept_R < share * kept_R[-1]).sum()) + 1 if bool(kept_R[-1] > 0) else 0


def effective_between(values_R: Tensor, norm: float, count: int) -> tuple[float, float]:
    """Least and greatest effective rank of a matrix of `count` singular values whose largest R and norm are known.

    The rest has the energy E = norm² - Σσ², and none is above σ_R. Both bounds are attained: among all such rests the
    one of equal values is majorised by every other, the one of E // σ_R² values σ_R, a remainder and zeros
    majorises every other, and entropy falls with majorisation.

    >>> [round(each, 3) for each in effective_between(torch.tensor([2.0]), math.sqrt(4 + 4 + 1), 4)]
    [2.872, 3.919]
    """
    values_R = values_R.double()
    rest, last, free = max(norm**2 - float(values_R.square().sum()), 0.0), float(values_R[-1]), count - len(values_R)
    if rest <= norm**2 * EPSILON**2 or not free:
        return (effective_rank(values_R),) * 2
    whole = min(int(rest / last**2), free)
    remainder = math.sqrt(max(rest - whole * last**2, 0.0))
    narrow = torch.tensor([last] * whole + [remainder] * (whole < free)).to(values_R)
    even = torch.full((free,), math.sqrt(rest / free)).to(values_R)
    return effective_rank(torch.cat([values_R, narrow])), effective_rank(torch.cat([values_R, even]))


@dataclass(frozen=True, eq=False)
class ByLayer:
    """A number by layer and role; NaN where there is no such matrix."""

    layers: tuple[int | None, ...]
    roles: tuple[str, ...]
    values_LT: Tensor


class Placed(Protocol):
    """What has a place in the model."""

    @property
    def layer(self) -> int | None:
        """The number of its layer."""

    @property
    def role(self) -> str:
        """What it is in its layer."""


P = TypeVar("P", bound=Placed)


def by_layer(of: Iterable[P], number: Callable[[P], float]) -> ByLayer:
    """A number of spectra, or of whatever has a place, by layer and role; the mean over stacked experts.

    >>> one = Spectrum("x", "x", "attn.q", 3, (4, 4), torch.tensor([3.0, 4.0]), False)
    >>> found = by_layer([one], lambda spectrum: spectrum.norm)
    >>> found.layers, found.roles, found.values_LT.tolist()
    ((3,), ('attn.q',), [[5.0]])
    """
    cells: dict[tuple[int | None, str], list[float]] = defaultdict(list)
    for each in of:
        cells[each.layer, each.role].append(number(each))
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: (layer is None, layer or 0))
    roles = list(dict.fromkeys(role for _, role in cells))
    values = [[fmean(cells.get((layer, role), [math.nan])) for role in roles] for layer in layers]
    return ByLayer(
        tuple(layers), tuple(roles), torch.tensor(values, dtype=torch.float64).reshape(len(layers), len(roles))
    )
