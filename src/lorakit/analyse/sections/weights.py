"""The updates against the weights that they change (Hu et al. 2021, table 7 and figure 8)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from lorakit.analyse.amplification import Against, against, overlap
from lorakit.analyse.page import Figure, HeatMap, Lines, Section, Table
from lorakit.analyse.randomised import EXACT, Top, top
from lorakit.analyse.sections._grids import depth_map
from lorakit.analyse.spectra import by_layer
from lorakit.analyse.study import Study, called
from lorakit.analyse.subspace import directions
from lorakit.core.exchange import Factored

WORDS = """
‖UᵀWV‖_F is what the weight W does within the directions U, V: those of the update ΔW, W's own strongest, or random
ones. An update whose directions are W's own would repeat the weight; one whose directions W hardly uses has found
something that was there but weak. The amplification factor ‖ΔW‖_F / ‖UᵀWV‖_F says how much stronger the update makes
it.

Figure 8 shows φ of the strongest tenth of W's directions (of a large weight at most 128) with those of the update, and
what chance would give.

The ranks of W itself say whether the weight uses all the directions it has. Of a weight too large to know them all,
two numbers are told, between which the rank lies.
"""
TABLE = ["adapter", "matrix", "r", "‖UᵀWV‖ of ΔW", "of W", "of random", "‖W‖_F", "‖ΔW‖_F", "amplification"]
RANKS = [f"{kind} rank, at {end}" for kind in ("effective", "numerical") for end in ("least", "most")]
OWN = ["matrix", "smaller side", "stable rank", *RANKS]
MOST = 128  # directions of a weight that is too large to know all
MANY = 200_000_000  # numbers in all weights; above, only the layers of figure 6 are read


@dataclass(frozen=True, eq=False)
class Own:
    """What a weight is without any update."""

    side: int  # the smaller one
    values_R: Tensor  # singular values, the strongest
    stable: float
    effective: tuple[float, float]  # between these
    numerical: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Seen:
    """One update against its weight."""

    adapter: str
    role: str
    layer: int | None
    against: Against
    own: Own
    overlap: Mapping[str, tuple[Tensor, Tensor]]  # φ of left and right directions, each with that of chance


def section(study: Study) -> Section | None:
    """Table 7 and figure 8 in the middle layer; amplification and W's own ranks over depth."""
    if not study.weights:
        return None
    found = list(_seen(study))
    middle = [each for each in found if each.layer == study.middle]
    figures: list[Figure] = [_table(study, middle)] if middle else []
    amplified = {name: by_layer(_of(name, found), lambda each: each.against.amplification) for name in study.adapters}
    figures += depth_map("Amplification of the weights' directions", amplified, "‖ΔW‖ / ‖UᵀWV‖")
    figures += [_overlaps(study, middle, side) for side in ("left", "right") if middle]
    return Section("Updates against weights", WORDS, [*figures, *_own(study, middle), *_own_ranks(found)])


def _of(name: str, found: list[Seen]) -> list[Seen]:
    return [each for each in found if each.adapter == name]


def _seen(study: Study) -> Iterator[Seen]:
    """Each weight is read and decomposed once, for all adapters that change it; one weight is held at a time."""
    changed: dict[str, list[tuple[str, Factored]]] = {}
    layers = layers_read(study)
    for name, own in study.matrices.items():
        for each in own:
            if each.layer in layers:
                changed.setdefault(each.name, []).append((name, each))
    for members in changed.values():
        whole = study.weight(members[0][1])
        if whole is not None:
            weight, side = whole.read(), min(members[0][1].shape)
            rank = max(each.rank for _, each in members)
            own_top = top(weight, side if side <= EXACT else max(rank, min(side // 10, MOST)))
            for name, each in members:
                update = directions(each)
                if len(update.values_R):
                    own_ranks = Own(side, own_top.values_R, own_top.stable, own_top.effective, own_top.numerical)
                    shared = overlap(_strongest(own_top), update) if each.layer == study.middle else {}
                    yield Seen(name, called(each), each.layer, against(weight, update, own_top), own_ranks, shared)


def layers_read(study: Study) -> tuple[int | None, ...]:
    """The layers whose weights are read: all, or of a large base those that the figures show."""
    numbers = sum(math.prod(each.shape) for each in study.weights.values())
    return (*study.layers, None) if numbers <= MANY else (*study.shown, study.middle)


def _strongest(own: Top) -> Top:
    count = max(min(own.shape) // 10, 1)
    return replace(own, values_R=own.values_R[:count], left_OR=own.left_OR[:, :count], right_IR=own.right_IR[:, :count])


def _table(study: Study, middle: list[Seen]) -> Table:
    def row(each: Seen) -> list[str | int | float]:
        found = each.against
        told = [found.update, found.own, found.random, found.weight_norm, found.update_norm, found.amplification]
        return [each.adapter, each.role, found.rank, *told]

    return Table(title=_titled("Table 7", study), columns=TABLE, rows=[row(each) for each in middle])


def _titled(what: str, study: Study) -> str:
    return what if study.middle is None else f"{what}, layer {study.middle}"


def _overlaps(study: Study, middle: list[Seen], side: str) -> HeatMap:
    """Of the first two roles, an adapter after the other, with chance at the largest rank at the end."""
    roles = list(dict.fromkeys(each.role for each in middle))[:2]
    own = [each for role in roles for each in middle if each.role == role]
    panels = {f"{each.adapter}, {each.role}": each.overlap[side][0] for each in own}
    widest: dict[tuple[int, float], tuple[str, Tensor]] = {}  # by how many of W's directions and what one is worth
    for each in sorted(own, key=lambda each: each.against.rank):
        grid = each.overlap[side][1]
        widest[len(grid), float(grid[0, 0])] = each.role, grid
    one = len(widest) == 1
    panels |= {"by chance" if one else f"by chance, {role}": grid for role, grid in widest.values()}
    title = _titled(f"Figure 8, {side} directions of W and of ΔW", study)
    return HeatMap(title=title, panels=panels, value="φ", x="j (ΔW)", y="i (W)", scale=(0, 1))


def _own(study: Study, middle: list[Seen]) -> list[Figure]:
    """Ranks and singular values of the weights of one layer."""
    weights = {each.role: each.own for each in middle}
    if not weights:
        return []
    rows: list[list[str | int | float]] = [
        [role, own.side, own.stable, *own.effective, *own.numerical] for role, own in weights.items()
    ]
    table = Table(title=_titled("Ranks of the weights", study), columns=OWN, rows=rows)
    lines = {role: (own.values_R / own.values_R[0]).tolist() for role, own in weights.items() if own.stable}
    at = list(range(1, max(map(len, lines.values()), default=0) + 1))
    title = _titled("Singular values of the weights", study)
    return [table, Lines(title=title, x="direction", y="σ / σ₁", at=at, lines=lines, log="y")]


def _own_ranks(found: list[Seen]) -> list[HeatMap]:
    tables = {
        "at least": by_layer(found, lambda each: each.own.effective[0] / each.own.side),
        "at most": by_layer(found, lambda each: each.own.effective[1] / each.own.side),
    }
    if all(each.own.effective[0] == each.own.effective[1] for each in found):
        tables = {"W": tables["at least"]}
    return depth_map("Effective rank of W, as a share of its smaller side", tables, "share", (0, 1))
