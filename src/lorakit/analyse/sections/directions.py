"""Directions that two adapters share (Hu et al. 2021, figures 3, 4, 6 and 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan

from torch import Tensor

from lorakit.analyse.page import Figure, HeatMap, Lines, Section
from lorakit.analyse.study import Study, called, picked
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
MOST_ZOOMED = 2


@dataclass(frozen=True, eq=False)
class Shared:
    """φ of two adapters' updates of one matrix."""

    widths: Mapping[str, int]  # of the space of A's directions, and of B's
    grids: Mapping[str, Tensor]  # of A and of B


ByRole = dict[str, dict[int | None, Shared]]  # by layer, too


def section(study: Study) -> Section | None:
    """φ of A and B for every pair: the middle layer, the layers of figure 6, and the first directions over depth."""
    figures = [figure for one, other in study.pairs for figure in _pair(study, one, other)]
    return Section("Directions that adapters share", WORDS, figures) if figures else None


def _pair(study: Study, one: str, other: str) -> list[Figure]:
    found = _found(study, one, other)
    layers = sorted({layer for own in found.values() for layer in own if layer is not None})
    middle = study.middle if study.middle in layers or not layers else layers[len(layers) // 2]
    figures: list[Figure] = []
    for side in ("A", "B"):
        figures += _middle(f"{side} of {one} and {other}", found, middle, side, (one, other))
    if len(layers) > 1:
        figures += [_layers(role, own, (one, other)) for role, own in found.items() if {*own} != {None}]
        figures.append(_first({role: own for role, own in found.items() if {*own} != {None}}, layers, (one, other)))
    return figures


def _found(study: Study, one: str, other: str) -> ByRole:
    """What the two share by role and layer, of the first roles; nothing where an update is zero."""
    found: ByRole = {}
    for layer in (*study.layers, None):
        for mine, theirs in study.both(one, other, layer):
            role = called(mine)
            shared = _shared(mine, theirs) if role in found or len(found) < MOST_ROLES else None
            if shared:
                found.setdefault(role, {})[layer] = shared
    return found


def _shared(mine: Factored, theirs: Factored) -> Shared | None:
    first, second = directions(mine), directions(theirs)
    if not len(first.values_R) or not len(second.values_R):
        return None
    return Shared({"A": mine.shape[1], "B": mine.shape[0]}, similarities(first, second))


def _middle(title: str, found: ByRole, middle: int | None, side: str, names: tuple[str, str]) -> list[Figure]:
    """Figures 3 and 4: one layer, and what lies outside of all layers."""
    own = {role: by_layer.get(middle) or by_layer.get(None) for role, by_layer in found.items()}
    there = {role: each for role, each in own.items() if each}
    grids = {role: each.grids[side] for role, each in there.items()}
    if not grids:
        return []
    at = "" if middle is None else f", layer {middle}"
    return [_map(f"{title}{at}", grids | _zoomed(grids) | _random(there, side), names)]


def _zoomed(grids: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first columns and rows alone, where one adapter has many more directions than the other."""
    few = {role: min(grid.shape) for role, grid in grids.items() if max(grid.shape) >= 4 * min(grid.shape)}
    return {f"{role}, the first {n}": grids[role][:n, :n] for role, n in list(few.items())[:MOST_ZOOMED]}


def _random(own: Mapping[str, Shared], side: str) -> dict[str, Tensor]:
    """Two random matrices of each shape that there is."""
    shapes: dict[tuple[int, int, int], str] = {}
    for name, each in own.items():
        rows, columns = each.grids[side].shape
        shapes.setdefault((each.widths[side], rows, columns), name)
    one = len(shapes) == 1
    return {"random" if one else f"random, as {name}": random_grid(*shape) for shape, name in shapes.items()}


def _map(title: str, panels: dict[str, Tensor], names: tuple[str, str]) -> HeatMap:
    return HeatMap(title=title, panels=panels, value="φ", x=f"j ({names[1]})", y=f"i ({names[0]})", scale=(0, 1))


def _layers(role: str, own: dict[int | None, Shared], names: tuple[str, str]) -> HeatMap:
    """Figures 6 and 7."""
    shown = picked(sorted(layer for layer in own if layer is not None))
    there = {f"layer {layer}": own[layer] for layer in shown}
    panels: dict[str, Tensor] = {}
    for side in ("A", "B"):
        panels |= {f"{side}, {name}": each.grids[side] for name, each in there.items()}
        panels |= {f"{side}, random": grid for grid in _random({role: own[shown[0]]}, side).values()}
    return _map(f"A and B of {names[0]} and {names[1]} by layer: {role}", panels, names)


def _first(found: ByRole, layers: list[int], names: tuple[str, str]) -> Lines:
    """φ(1, 1) and φ of all directions of A over depth, and what chance would give of all."""
    lines: dict[str, list[float]] = {}
    chance: dict[str, list[float]] = {}
    for role, own in found.items():
        there = [own.get(layer) for layer in layers]
        lines[f"{role}, first"] = [float(each.grids["A"][0, 0]) if each else nan for each in there]
        lines[f"{role}, all"] = [float(each.grids["A"][-1, -1]) if each else nan for each in there]
        chance[f"{role}, all by chance"] = [_by_chance(each) if each else nan for each in there]
    if len({str(line) for line in chance.values()}) == 1:
        chance = {"all, by chance": next(iter(chance.values()))}
    title = f"Directions of A that {names[0]} and {names[1]} share, over depth"
    return Lines(title=title, x="layer", y="φ", at=layers, lines=lines | chance, dashed=list(chance))


def _by_chance(each: Shared) -> float:
    rows, columns = each.grids["A"].shape
    return expected(rows, columns, each.widths["A"])
