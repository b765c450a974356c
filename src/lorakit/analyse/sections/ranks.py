"""How many directions the updates use of those that the adapter pays for."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.analyse.page import Cell, Figure, Lines, Section, Table
from lorakit.analyse.sections._grids import by_depth
from lorakit.analyse.spectra import Spectrum, smallest_rank
from lorakit.analyse.study import Study, called

WORDS = """
The singular values of ΔW tell how many directions training used. The effective rank counts them by how evenly they
are used (exp of the entropy of σ / Σσ), the stable rank by how many are as strong as the strongest (‖ΔW‖_F² / σ₁²). A
curve that falls at once has rank to spare.

The smallest rank that keeps a share of ‖ΔW‖_F² is what `lorakit compress` would write; ranks beyond the one that keeps
99 % are wasted.
"""
SHARES = (0.9, 0.99)


def section(study: Study) -> Section | None:
    """Spectra of the middle layer, ranks by layer and role, and what could be saved."""
    found = study.spectra
    effective = by_depth("Effective rank", found, lambda each: each.effective, "effective rank")
    stable = by_depth("Stable rank", found, lambda each: each.stable, "stable rank")
    wasted = by_depth("Wasted ranks", found, lambda each: each.wasted, "ranks")
    figures = [_table(found), *_curves(study, found), *effective, *stable, *wasted]
    return Section("Which of the rank is used", WORDS, figures)


def _table(found: dict[str, list[Spectrum]]) -> Table:
    kept = [f"that keep {100 * share:g} %" for share in SHARES]
    columns = ["adapter", "sum of ranks", "above rounding", *kept, "mean effective rank"]
    rows: list[list[Cell]] = [
        [
            name,
            sum(each.rank for each in own),
            sum(each.numerical for each in own),
            *(sum(smallest_rank(each.values_R, share) for each in own) for share in SHARES),
            sum(each.effective for each in own) / len(own),
        ]
        for name, own in found.items()
    ]
    return Table(title="Ranks paid for and ranks used", columns=columns, rows=rows)


def _curves(study: Study, found: dict[str, list[Spectrum]]) -> list[Figure]:
    lines = {
        f"{name}, {called(each)}": _relative(each)
        for name, own in found.items()
        for each in own
        if each.layer == study.middle and not each.dead
    }
    if not lines:
        return []
    longest = max(len(line) for line in lines.values())
    title = "Singular values" if study.middle is None else f"Singular values, layer {study.middle}"
    at = list(range(1, longest + 1))
    return [Lines(title=title, x="direction", y="σ / σ₁", at=at, lines=lines, log="y")]


def _relative(each: Spectrum) -> Sequence[float]:
    """σ / σ₁ without what is zero but for rounding, which a logarithm cannot show."""
    return (each.values_R[: each.numerical] / each.values_R[0]).tolist()
