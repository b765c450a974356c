"""Which weights to adapt: spend a budget of trained numbers where calibration data say that they do most.

Legend: I in, O out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn

from lorakit.core.sites import Site
from lorakit.core.statistics import Key, SiteStatistics, Statistics, explained, gradient_of, moment_of, not_gathered
from lorakit.errors import BadMethod

By = Literal["gradient", "variance", "nfn"]
NEEDS: Final[Mapping[By, frozenset[str]]] = {  # what `calibrate` has to gather for each
    "gradient": frozenset({"gradient"}),
    "variance": frozenset({"inputs"}),
    "nfn": frozenset({"norms"}),
}


@dataclass(frozen=True)
class Choice:
    """A site, the rank that it gets, and what speaks for it."""

    site: Site
    rank: int
    score: float  # gradient energy, share of variance explained at this rank, or normalised feature norm

    @property
    def numbers(self) -> int:
        """Trained numbers of A and B: rank (in + out)."""
        return self.rank * _cost(self.site)


def gradient_energy(statistics: SiteStatistics) -> float:
    """‖∇_W L‖_F²: how fast the loss falls along the gradient, at first."""
    return float(gradient_of(statistics).double().square().sum())


def normalised_feature_norm(statistics: SiteStatistics, weight_OI: Tensor) -> float:
    """mean‖W z‖ / (mean‖z‖ · ‖W‖_F / √in): how much more W stretches real inputs than random ones of their length.

    Layers with the lowest are the best to adapt (PLoP, arXiv:2506.20629).

    >>> statistics = SiteStatistics(shape=(2, 2), tokens=5, norm_in=3.0, norm_out=3.0)
    >>> round(normalised_feature_norm(statistics, torch.eye(2)), 6)
    1.0
    """
    if statistics.norm_in is None or statistics.norm_out is None:
        raise not_gathered("norms")
    random = statistics.norm_in * float(weight_OI.float().norm()) / math.sqrt(weight_OI.shape[1])
    return statistics.norm_out / random if random else math.inf


def weights_of(model: nn.Module, sites: Sequence[Site]) -> dict[Key, Tensor]:
    """The matrix W (out, in) of each site, as views of the model's own."""
    found: dict[Key, Tensor] = {}
    for site in sites:
        if site.layout is None:
            raise BadMethod(f"{site.path} has no weight matrix; leave it out")
        weight_OI = site.layout.matrix(model.get_submodule(site.path).get_parameter("weight").detach())
        found[site.path, site.slice] = weight_OI if site.slice is None else site.slice.take(weight_OI, 0)
    return found


def choose(
    sites: Sequence[Site],
    statistics: Statistics,
    weights: Mapping[Key, Tensor],
    *,
    budget: int,
    by: By,
    rank: int = 8,
) -> list[Choice]:
    """Sites and ranks that cost at most `budget` trained numbers, the best first; no site gets more than `rank`.

    `gradient` and `variance` buy one direction after another, wherever it brings most for its in + out numbers: the
    squared singular values of the mean gradient, or the shares of the inputs' variance. `nfn` gives `rank` to one site
    after another, from the lowest normalised feature norm on.

    Raises:
        BadMethod: a budget below the cheapest single direction, or statistics that were not gathered.
    """
    if by not in get_args(By):
        raise BadMethod(f"weights are chosen by one of {', '.join(get_args(By))}, not by {by!r}")
    _check(sites, statistics, budget, rank)
    return _by_norm(sites, statistics, weights, budget, rank) if by == "nfn" else _SPENT[by](sites, statistics, budget, rank)


def _check(sites: Sequence[Site], statistics: Statistics, budget: int, rank: int) -> None:
    absent = [site.path for site in sites if (site.path, site.slice) not in statistics or site.layout is None]
    if absent or not sites:
        raise BadMethod(f"there are no statistics of {', '.join(absent[:5]) or 'any site'}; calibrate what is to be chosen")
    if rank < 1:
        raise BadMethod(f"the largest rank of a site is {rank}; it has to be at least 1")
    cheapest = min(sites, key=_cost)
    if budget < _cost(cheapest):
        raise BadMethod(
            f"a budget of {budget} trained numbers buys nothing: the cheapest site, {cheapest.path}, "
            f"takes {_cost(cheapest)} for rank 1"
        )


def _cost(site: Site) -> int:
    """Trained numbers of one direction."""
    assert site.layout is not None
    return site.layout.in_features + site.out_features


def _most(site: Site, rank: int) -> int:
    assert site.layout is not None
    return min(rank, site.layout.in_features, site.out_features)


Gains = Callable[[SiteStatistics, int], Tensor]


def _by_gain(sites: Sequence[Site], statistics: Statistics, budget: int, rank: int, gains: Gains) -> list[int]:
    """Ranks bought direction by direction; a site's directions come in falling order, so each rank is its best."""
    offers = [
        (-float(gain) / _cost(site), order, number)
        for number, site in enumerate(sites)
        for order, gain in enumerate(gains(statistics[site.path, site.slice], _most(site, rank)))
        if gain > 0
    ]
    ranks = [0] * len(sites)
    for _, _, number in sorted(offers):
        if _cost(sites[number]) <= budget:
            budget -= _cost(sites[number])
            ranks[number] += 1
    return ranks


def _energies(statistics: SiteStatistics, most: int) -> Tensor:
    return torch.linalg.svdvals(gradient_of(statistics).double())[:most].square()


def _variances(statistics: SiteStatistics, most: int) -> Tensor:
    return explained(moment_of(statistics, "inputs", 1), most)


def _by_gradient(sites: Sequence[Site], statistics: Statistics, budget: int, rank: int) -> list[Choice]:
    ranks = _by_gain(sites, statistics, budget, rank, _energies)
    scores = [gradient_energy(statistics[site.path, site.slice]) for site in sites]
    return _best_first(sites, ranks, scores, [score / _cost(s) for s, score in zip(sites, scores, strict=True)])


def _by_variance(sites: Sequence[Site], statistics: Statistics, budget: int, rank: int) -> list[Choice]:
    ranks = _by_gain(sites, statistics, budget, rank, _variances)
    each = [statistics[site.path, site.slice] for site in sites]
    scores = [float(_variances(s, r).sum()) for s, r in zip(each, ranks, strict=True)]
    return _best_first(sites, ranks, scores, [score / _cost(s) for s, score in zip(sites, scores, strict=True)])


def _by_norm(
    sites: Sequence[Site], statistics: Statistics, weights: Mapping[Key, Tensor], budget: int, rank: int
) -> list[Choice]:
    keys = [(site.path, site.slice) for site in sites]
    norms = [normalised_feature_norm(statistics[key], weights[key]) for key in keys]
    ranks = [0] * len(sites)
    for number in sorted(range(len(sites)), key=norms.__getitem__):
        ranks[number] = min(_most(sites[number], rank), budget // _cost(sites[number]))
        budget -= ranks[number] * _cost(sites[number])
    return _best_first(sites, ranks, norms, [-norm for norm in norms])


def _best_first(
    sites: Sequence[Site], ranks: Sequence[int], scores: Sequence[float], order: Sequence[float]
) -> list[Choice]:
    numbers = sorted(range(len(sites)), key=lambda number: -order[number])
    return [Choice(sites[n], ranks[n], scores[n]) for n in numbers if ranks[n]]


_SPENT: Final = {"gradient": _by_gradient, "variance": _by_variance}
