"""A study as a page: one section a question, in the order in which one would ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from lorakit.analyse.page import Cell, Page, Section
from lorakit.analyse.sections import depth, directions, doing, intruding, meeting, norms, ranks, reading, weights
from lorakit.analyse.study import Study

SECTIONS: Final[tuple[Callable[[Study], Section | None], ...]] = (
    norms.section,
    ranks.section,
    directions.section,
    meeting.section,
    weights.section,
    intruding.section,
    depth.section,
    doing.section,
    reading.section,
)
Watch = Callable[[str], None]


def report(study: Study, *, watch: Watch = lambda title: None) -> Page:
    """All that the study has something for; `watch` is called with what is worked on.

    Raises:
        LorakitError: an adapter that cannot be analysed, or adapters that do not belong together.
    """
    sections = []
    for make in SECTIONS:
        watch(make.__module__.rsplit(".", 1)[-1])
        section = make(study)
        sections += [] if section is None else [section]
    return Page(" and ".join(study.adapters), _facts(study), sections)


def _facts(study: Study) -> list[tuple[str, Cell]]:
    bases = {exchange.base for exchange in study.adapters.values() if exchange.base}
    told: list[tuple[str, Cell]] = [("base", ", ".join(sorted(bases)) or "not told")]
    for name, exchange in study.adapters.items():
        ranks = sorted({update.rank for update in exchange.updates})
        scales = sorted({round(update.scale, 6) for update in exchange.updates})
        numbers = sum(value.numel for value in exchange.values)
        sizes = f"rank {_few(ranks)}, scale {_few(scales)}, {numbers:,} numbers"
        told.append((name, f"{len(exchange.updates)} layers, {sizes}{_lost(study, name)}"))
    return told


def _few(numbers: list[int] | list[float]) -> str:
    shown = ", ".join(f"{number:g}" for number in numbers[:6])
    return shown + (" …" if len(numbers) > 6 else "")


def _lost(study: Study, name: str) -> str:
    share = study.lost.get(name)
    told = f"; a difference of models, {100 * (share or 0.0):.2g} % of ‖ΔW‖_F left out"
    return "" if share is None else told
