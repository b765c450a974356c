"""The updates against the weights that they change (Hu et al. 2021, table 7 and figure 8)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from lorakit.analyse.amplification import Against, against, overlap
from lorakit.analyse.page import Figure, HeatMap, Section, Table
from lorakit.analyse.randomised import EXACT, Top, top
from lorakit.analyse.sections._grids import depth_map
from lorakit.analyse.spectra import by_layer
from lorakit.analyse.study import Study
from lorakit.analyse.subspace import directions
from lorakit.core.exchange import Factored

WORDS = """
‖UᵀWV‖_F is what the weight W does within the directions U, V: those of the update ΔW, W's own strongest, or random
ones. An update whose directions are W's own would repeat the weight; one whose directions W hardly uses has found
something that was there but weak. The amplification factor ‖ΔW‖_F / ‖UᵀWV‖_F says how much stronger the update makes
it.

Figure 8 shows φ of the strongest tenth of W's directions with those of the update, and what chance would give.

The effective rank of W itself says whether the weight uses all the directions it has.
"""
TABLE = ["adapter", "matrix", "r", "‖UᵀWV‖ of ΔW", "of W", "of random", "‖W‖_F", "‖ΔW‖_F", "amplification"]
MOST = 128  # directions of a weight that is too large to know all
MANY = 200_000_000  # numbers in all weights; above, only the layers of figure 6 are read


@dataclass(frozen=True, eq=False)
class Seen:
    """One update against its weight."""

    adapter: str
    role: str
    layer: int | None
    against: Against
    effective: tuple[float, float]  # of W, as a share of its smaller side, between these
    overlap: Mapping[str, tuple[Tensor, Tensor]]  # φ of left and right directions, each with that of chance


def section(study: Study) -> Section | None:
    """Table 7 and figure 8 in the middle layer; amplification and W's own ranks over depth."""
    if not study.weights:
        return None
    found = list(_seen(study))
    middle = [each for each in found if each.layer == study.middle]
    figures: list[Figure] = [_table(study, middle)]
    amplified = {name: by_layer(_of(name, found), lambda each: each.against.amplification) for name in study.adapters}
    figures += depth_map("Amplification of the weights' directions", amplified, "‖ΔW‖ / ‖UᵀWV‖")
    figures += [_overlaps(study, middle, side) for side in ("left", "right") if middle]
    return Section("Updates against weights", WORDS, [*figures, *_own_ranks(found)])


def _of(name: str, found: list[Seen]) -> list[Seen]:
    return [each for each in found if each.adapter == name]


def _seen(study: Study) -> Iterator[Seen]:
    """Each weight is read and decomposed once, for all adapters that change it; one weight is held at a time."""
    changed: dict[str, list[tuple[str, Factored]]] = {}
    for name, own in study.matrices.items():
        for each in own:
            if each.layer in layers_read(study):
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
                    low, high = (share / side for share in own_top.effective)
                    shared = overlap(_strongest(own_top), update) if each.layer == study.middle else {}
                    yield Seen(name, each.role, each.layer, against(weight, update, own_top), (low, high), shared)


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
    widest = max((each.overlap[side][1] for each in own), key=lambda grid: grid.shape[1])
    title = _titled(f"Figure 8, {side} directions of W and of ΔW", study)
    panels |= {"by chance": widest}
    return HeatMap(title=title, panels=panels, value="φ", x="j (ΔW)", y="i (W)", scale=(0, 1))


def _own_ranks(found: list[Seen]) -> list[HeatMap]:
    tables = {
        "at least": by_layer(found, lambda each: each.effective[0]),
        "at most": by_layer(found, lambda each: each.effective[1]),
    }
    if all(each.effective[0] == each.effective[1] for each in found):
        tables = {"W": tables["at least"]}
    return depth_map("Effective rank of W, as a share of its smaller side", tables, "share", (0, 1))
