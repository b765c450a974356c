"""Few smooth or sparse patterns of an adapter's updates over depth: the structured components of `inits`, over layers.

Legend: I in, O out, R rank, L layers, F units, K patterns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from lorakit.analyse.subspace import Pair, factors, finite, refuse_above
from lorakit.core.exchange import Factored
from lorakit.core.statistics import FOLDS, Moment
from lorakit.errors import NotComparable
from lorakit.inits._geometry import spline
from lorakit.inits._spatial import components, cross_validated, problem

LEAST_LAYERS: Final = 4  # below, nothing can be told from a straight line


@dataclass(frozen=True, eq=False)
class Patterns:
    """Profiles over depth from which every unit's profile is nearly mixed: norm ≈ mean + Σ score · pattern."""

    layers: tuple[int, ...]
    mean_L: Tensor  # the mean profile of all units
    patterns_LK: Tensor  # orthonormal columns, the one that explains most first
    scores_FK: Tensor  # how much of each pattern a unit has
    explained_K: Tensor  # shares of the variance about the mean profile
    smooth: float  # the weight of roughness, as in `inits`
    sparse: float  # the weight of Σ|pattern|


def unit_norms(update: Factored | Pair, side: Literal["input", "output"]) -> Tensor:
    """How much ΔW = B A has to do with each unit: ‖ΔW[:, i]‖ of each input (I,), or ‖ΔW[o]‖ of each output (O,).

    >>> unit_norms((torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0], [0.0]])), "output").tolist()
    [5.0, 10.0, 0.0]
    """
    a_RI, b_OR = factors(update)
    thin_FR, other_XR = (a_RI.T, b_OR) if side == "input" else (b_OR, a_RI.T)
    return (thin_FR @ torch.linalg.qr(other_XR, mode="r")[1].T).norm(dim=1)


def over_depth(updates: Iterable[Factored], side: Literal["input", "output"]) -> tuple[tuple[int, ...], Tensor]:
    """The layers of one role's updates, and the norms (L, F) of their units in each.

    Take the side that is the residual stream, whose channels are the same in all layers: `input` of q, k, v, gate and
    up, `output` of o and down. A head's channels, or an MLP's hidden ones, are other units in every layer.

    Raises:
        NotComparable: updates of several roles, twice of one layer, of no layer, or of different shapes.

    >>> pair = torch.tensor([[3.0, 4.0]]), torch.ones(1, 1)
    >>> updates = [Factored(f"layers.{n}.q", f"layers.{n}.q", "q", n, 1, (1, 2), lambda: pair) for n in (0, 2)]
    >>> layers, norms_LF = over_depth(updates, "input")
    >>> layers, norms_LF.tolist()
    ((0, 2), [[3.0, 4.0], [3.0, 4.0]])
    """
    found = sorted(updates, key=lambda each: -1 if each.layer is None else each.layer)
    roles, shapes = Counter(each.role for each in found), Counter(each.shape for each in found)
    layers = tuple(each.layer for each in found if each.layer is not None)
    if len(roles) != 1 or len(shapes) != 1 or len(set(layers)) != len(found):
        raise NotComparable(
            "patterns over depth need updates of one role and shape, one a layer; there are "
            f"{len(found)} updates, roles {sorted(roles)}, shapes {sorted(shapes)} and {len(set(layers))} layers"
        )
    return layers, torch.stack([unit_norms(each, side) for each in found])


def patterns(
    norms_LF: Tensor,
    count: int,
    layers: Sequence[int] | None = None,
    penalties: tuple[float, float] | None = None,
) -> Patterns:
    """The `count` patterns over depth of the norms of F units, smooth over the layers' numbers and sparse in them.

    SpatPCA (Wang and Huang 2017) with layers as places and units as samples; roughness is that of a cubic spline. The
    `penalties` of roughness and of Σ|pattern| are chosen by cross-validation over units where there are at least four
    layers and five units for each fold, and zero (plain principal components) below.

    Raises:
        NotComparable: more patterns than layers or units, units that do not differ, layers that do not rise, or NaN.

    >>> found = patterns(torch.tensor([[1.0, 3.0], [2.0, 4.0], [3.0, 5.0], [4.0, 6.0]]), 1)
    >>> found.mean_L.tolist(), found.patterns_LK.T.round(decimals=9).tolist(), found.layers
    ([2.0, 3.0, 4.0, 5.0], [[0.5, 0.5, 0.5, 0.5]], (0, 1, 2, 3))
    """
    values_FL = finite(norms_LF).T
    units, depth = values_FL.shape
    refuse_above(count, min(units, depth))
    places_L = torch.tensor([*range(depth)] if layers is None else [*layers]).double()
    if len(places_L) != depth or bool((places_L.diff() <= 0).any()):
        raise NotComparable(f"{depth} layers need as many numbers that rise, not {places_L.long().tolist()}")
    mean_L = values_FL.mean(0)
    centred_FL = values_FL - mean_L
    if units < 2 or float(centred_FL.norm()) <= 1e-6 * float(values_FL.norm()):
        raise NotComparable(f"the {units} units have the same profile over depth, so that it is their only pattern")
    given = problem(_folds(centred_FL), spline(places_L), centred_FL.device)
    if penalties is None:
        enough = depth >= LEAST_LAYERS and units >= 5 * FOLDS
        penalties = cross_validated(given, count) if enough else (0.0, 0.0)
    patterns_LK = components(given.moment_DD, given.roughness_DD, count, *penalties)
    scores_FK = centred_FL @ patterns_LK
    explained_K, order_K = (scores_FK.square().sum(0) / centred_FL.square().sum()).sort(descending=True)
    names = tuple(int(place) for place in places_L)
    return Patterns(names, mean_L, patterns_LK[:, order_K], scores_FK[:, order_K], explained_K, *penalties)


def _folds(centred_FL: Tensor) -> list[Moment]:
    """Moments of every fifth unit, from the first, the second, …, scaled to unit variance."""
    scaled_FL = (centred_FL / centred_FL.norm() * len(centred_FL) ** 0.5).float()
    parts = [scaled_FL[start::FOLDS] for start in range(min(FOLDS, len(scaled_FL)))]
    return [Moment(len(part), part.mean(0), part.T.cov(correction=0).reshape([part.shape[1]] * 2)) for part in parts]
