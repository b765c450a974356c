"""Which weights to adapt: spend a budget of trained numbers where calibration data say that they do most.

Legend: I in, O out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn

from lorakit.core.sites import Site, weight_at
from lorakit.core.statistics import Key, SiteStatistics, Statistics, explained, moment_of, not_gathered
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
    score: float  # gradient energy or share of the inputs' variance at this rank, or normalised feature norm

    @property
    def numbers(self) -> int:
        """Trained numbers of A and B: rank (in + out)."""
        return self.rank * _cost(self.site)


def normalised_feature_norm(statistics: SiteStatistics, weight_OI: Tensor) -> float:
    """mean‖W z‖ / (mean‖z‖ · ‖W‖_F / √in): how much more W stretches real inputs than random ones of their length.

    Layers with the lowest are the best to adapt (PLoP, arXiv:2506.20629).

    >>> statistics = SiteStatistics(shape=(2, 2), tokens=5, norm_in=3.0, norm_out=3.0)
    >>> round(normalised_feature_norm(statistics, torch.eye(2)), 6)
    1.0
    """
    if statistics.norm_in is None or statistics.norm_out is None:
        raise not_gathered("norms")
    random = statistics.norm_in * float(weight_OI.detach().float().norm()) / math.sqrt(weight_OI.shape[1])
    return statistics.norm_out / random if random else math.inf


def weights_of(model: nn.Module, sites: Sequence[Site]) -> dict[Key, Tensor]:
    """The matrix W (out, in) of each site, as views of the model's own."""
    return {(site.path, site.slice): weight_at(model.get_submodule(site.path), site.slice) for site in sites}


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
        BadMethod: what `check_terms` refuses, or statistics that were not gathered.
    """
    absent = [site.path for site in sites if (site.path, site.slice) not in statistics or site.layout is None]
    if absent or not sites:
        raise BadMethod(f"there are no statistics of {', '.join(absent[:5]) or 'any site'}; calibrate it first")
    check_terms(sites, budget=budget, by=by, rank=rank)
    found = [statistics[site.path, site.slice] for site in sites]
    if by == "nfn":
        matrices = (weights[site.path, site.slice] for site in sites)
        norms = [normalised_feature_norm(each, w_OI) for each, w_OI in zip(found, matrices, strict=True)]
        return _lowest_first(sites, norms, budget, rank)
    gains = _energies if by == "gradient" else _variances
    return _by_gain(sites, [gains(each, _most(site, rank)) for site, each in zip(sites, found, strict=True)], budget)


def check_terms(sites: Sequence[Site], *, budget: int, by: By, rank: int) -> None:
    """Refuse what no statistics of these linear layers could answer, so that none need be gathered.

    Raises:
        BadMethod: no such criterion, a rank below 1, a budget below the cheapest single direction, or weights that are
            among the candidates twice.
    """
    if by not in get_args(By):
        raise BadMethod(f"weights are chosen by one of {', '.join(get_args(By))}, not by {by!r}")
    if rank < 1:
        raise BadMethod(f"the largest rank of a site is {rank}; it has to be at least 1")
    cheapest = min(sites, key=_cost)
    if budget < _cost(cheapest):
        raise BadMethod(
            f"a budget of {budget} trained numbers buys nothing: the cheapest site, {cheapest.path}, "
            f"takes {_cost(cheapest)} for rank 1"
        )
    _refuse_overlaps(sites)


def _refuse_overlaps(sites: Sequence[Site]) -> None:
    by_path: dict[str, list[Site]] = {}
    for site in sites:
        by_path.setdefault(site.path, []).append(site)
    for path, own in by_path.items():
        for one, other in combinations(own, 2):
            if torch.isin(_units(one), _units(other)).any():
                raise BadMethod(f"{path} is among the candidates as {one.role} and {other.role}, which share weights "
                                "that would be bought twice; leave out one of the two")  # fmt: skip


def _units(site: Site) -> Tensor:
    """The numbers of the layer's output units that a site has."""
    assert site.layout is not None
    units_O = torch.arange(site.layout.out_features)
    return units_O if site.slice is None else site.slice.take(units_O)


def _cost(site: Site) -> int:
    """Trained numbers of one direction."""
    assert site.layout is not None
    return site.layout.in_features + site.out_features


def _most(site: Site, rank: int) -> int:
    assert site.layout is not None
    return min(rank, site.layout.in_features, site.out_features)


def _energies(statistics: SiteStatistics, most: int) -> list[float]:
    """The gradient energy ‖∇_W L‖_F² along its first directions: its squared singular values."""
    if statistics.gradient_OI is None:
        raise not_gathered("gradient")
    return torch.linalg.svdvals(statistics.gradient_OI.double())[:most].square().tolist()


def _variances(statistics: SiteStatistics, most: int) -> list[float]:
    return explained(moment_of(statistics, "inputs", 1), most).tolist()


def _by_gain(sites: Sequence[Site], gains: Sequence[Sequence[float]], budget: int) -> list[Choice]:
    """Buy direction by direction; a site's gains fall, so what it gets are its best ones."""
    offers = [
        (-gain / _cost(site), order, number)
        for number, site in enumerate(sites)
        for order, gain in enumerate(gains[number])
        if gain > 0
    ]
    ranks = [0] * len(sites)
    for _, _, number in sorted(offers):
        if _cost(sites[number]) <= budget:
            budget -= _cost(sites[number])
            ranks[number] += 1
    bought = [Choice(site, r, sum(g[:r])) for site, r, g in zip(sites, ranks, gains, strict=True) if r]
    return sorted(bought, key=lambda choice: -choice.score / _cost(choice.site))


def _lowest_first(sites: Sequence[Site], norms: Sequence[float], budget: int, rank: int) -> list[Choice]:
    chosen = []
    for norm, site in sorted(zip(norms, sites, strict=True), key=lambda pair: pair[0]):
        given = min(_most(site, rank), budget // _cost(site))
        budget -= given * _cost(site)
        chosen += [Choice(site, given, norm)] if given else []
    return chosen
