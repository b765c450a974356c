"""Directions that two adapters share (Hu et al. 2021, figures 3, 4, 6 and 7)."""

from __future__ import annotations

from torch import Tensor

from lorakit.analyse.page import Figure, HeatMap, Lines, Section
from lorakit.analyse.study import Study
from lorakit.analyse.subspace import directions, expected, random_grid, similarities
from lorakit.core.exchange import Factored

WORDS = """
φ(i, j) says how much of the i strongest directions of one adapter lies within the j strongest of the other: 0 is
nothing, 1 is all. Those of A are directions of a layer's input, as in the paper's figures; those of B directions of
its output.

Two random subspaces have φ = max(i, j) / width in the mean; the panel "random" shows two random matrices of the same
shapes. What two ranks or two seeds have in common above that is what training found twice.
"""
MOST_ROLES = 4  # of which the figures show the layers; the tables and heat maps have all


def section(study: Study) -> Section | None:
    """φ of A and B for every pair: the middle layer, the layers of figure 6, and the first directions over depth."""
    figures = [figure for one, other in study.pairs for figure in _pair(study, one, other)]
    return Section("Directions that adapters share", WORDS, figures) if figures else None


def _pair(study: Study, one: str, other: str) -> list[Figure]:
    both = list(study.both(one, other, study.middle))[:MOST_ROLES]
    found = {mine.role: _similarities(mine, theirs) for mine, theirs in both}
    found = {role: grids for role, grids in found.items() if grids}
    if not found:
        return []
    figures: list[Figure] = []
    at = "" if study.middle is None else f", layer {study.middle}"
    for side, width in (("A", 1), ("B", 0)):
        grids = {role: each[side] for role, each in found.items()}
        first = both[0][0].shape[width]
        panels = grids | _zoomed(grids) | {"random": random_grid(first, *next(iter(grids.values())).shape)}
        figures.append(_map(f"{side} of {one} and {other}{at}", panels, one, other))
    roles = list(found)
    figures += [_layers(study, one, other, role) for role in roles if len(study.shown) > 1]
    return figures + _first(study, one, other, roles)


def _similarities(mine: Factored, theirs: Factored) -> dict[str, Tensor]:
    """φ by what is compared; nothing where an update is zero."""
    own, other = directions(mine), directions(theirs)
    return similarities(own, other) if len(own.values_R) and len(other.values_R) else {}


def _zoomed(grids: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first columns and rows alone, where one adapter has many more directions than the other."""
    role, grid = next(iter(grids.items()))
    few = min(grid.shape)
    return {f"{role}, the first {few}": grid[:few, :few]} if max(grid.shape) >= 4 * few else {}


def _map(title: str, panels: dict[str, Tensor], one: str, other: str) -> HeatMap:
    return HeatMap(title=title, panels=panels, value="φ", x=f"j ({other})", y=f"i ({one})", scale=(0, 1))


def _layers(study: Study, one: str, other: str, role: str) -> HeatMap:
    panels: dict[str, Tensor] = {}
    for layer in study.shown:
        for mine, theirs in study.both(one, other, layer):
            grids = _similarities(mine, theirs) if mine.role == role else {}
            panels |= {f"layer {layer}": grids["A"]} if grids else {}
    return _map(f"A of {one} and {other} by layer: {role}", panels, one, other)


def _first(study: Study, one: str, other: str, roles: list[str]) -> list[Figure]:
    """φ(1, 1) and φ of all directions, over depth."""
    lines: dict[str, list[float]] = {f"{role}, {which}": [] for role in roles for which in ("first", "all")}
    chance = 0.0
    for layer in study.layers:
        there = {mine.role: (mine, theirs) for mine, theirs in study.both(one, other, layer)}
        for role in roles:
            grids = _similarities(*there[role]) if role in there else {}
            lines[f"{role}, first"].append(float(grids["A"][0, 0]) if grids else float("nan"))
            lines[f"{role}, all"].append(float(grids["A"][-1, -1]) if grids else float("nan"))
            if grids:
                chance = expected(len(grids["A"]), grids["A"].shape[1], there[role][0].shape[1])
    random = {"all, by chance": [chance] * len(study.layers)}
    title = f"Directions of A that {one} and {other} share, over depth"
    at = list(study.layers)
    return [Lines(title=title, x="layer", y="φ", at=at, lines=lines | random, dashed=list(random))] if at else []
