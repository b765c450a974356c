"""Do two adapters' updates agree, pull apart, or pass each other by?"""

from __future__ import annotations

from dataclasses import replace

from lorakit.analyse.compare import Comparison, Meeting, compare
from lorakit.analyse.page import Section, Table
from lorakit.analyse.sections._grids import depth_map
from lorakit.analyse.spectra import by_layer
from lorakit.analyse.study import Study

WORDS = """
The cosine of two updates is 1 where they are the same but for length, -1 where one undoes the other and near 0 where
they pass each other by. The shares say how much of one update acts within the other's directions, where the sum of
both would make them interfere; by chance that is little, as directions are many. Adapters that change no matrix in
common cannot interfere in one, and have no row.
"""
COLUMNS = ["pair", "cosine", "of the first within the second", "of the second within the first", "by chance at most",
           "matrices of one alone"]  # fmt: skip


def section(study: Study) -> Section | None:
    """A row and a panel for every pair."""
    pairs = [pair for pair in study.pairs if study.meets(*pair)]
    if not pairs:
        return None
    found = {f"{a} and {b}": compare(study.adapters[a], study.adapters[b], (a, b)) for a, b in pairs}
    rows = [_row(name, each) for name, each in found.items()]
    table = Table(title="Pairs of adapters", columns=COLUMNS, rows=rows)
    tables = {name: by_layer(_called(study, each), lambda pair: pair.cosine) for name, each in found.items()}
    maps = depth_map("Cosine of the updates", tables, "cosine", (-1, 1))
    return Section("How adapters meet", WORDS, [table, *maps])


def _called(study: Study, found: Comparison) -> list[Meeting]:
    """Its pairs by what the report calls their layers."""
    return [replace(pair, role=study.role(pair.path, pair.role)) for pair in found.pairs]


def _row(name: str, each: Comparison) -> list[str | int | float]:
    chance = max(max(side.both for side in pair.chance) for pair in each.pairs)
    return [name, each.cosine, each.one.both, each.other.both, chance, sum(map(len, each.only))]
