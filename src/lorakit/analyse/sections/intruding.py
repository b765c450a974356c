"""Strong directions of W + ΔW that W never had (Shuttleworth et al. 2024, arXiv:2410.21228)."""

from __future__ import annotations

from lorakit.analyse.intruders import LOOKED_AT, intruders
from lorakit.analyse.page import Section, Table
from lorakit.analyse.study import Study

WORDS = """
An intruder is one of the strongest directions of W + ΔW that is like none of W's own (all cosines below 0.5). Full
fine-tuning makes few; adapters with many were found to forget more of what the base could do. Of a weight too large
to know all its directions, "at most" counts those that may be like a direction that is not known.
"""
COLUMNS = ["adapter", "matrix", f"intruders among the {LOOKED_AT} strongest", "at most", "least cosine"]


def section(study: Study) -> Section | None:
    """A row for each matrix of the layers that the figures show."""
    rows: list[list[str | int | float]] = []
    for name in study.adapters:
        for layer in sorted({*study.shown, study.middle}, key=lambda each: each or 0):
            for each in study.at(name, layer):
                weight = study.weight(each)
                if weight is not None:
                    found = intruders(weight, each, count=min(LOOKED_AT, *each.shape))
                    told = len(found.certain), len(found.possible), float(found.cosines_K.min())
                    rows.append([name, each.name, *told])
    table = Table(title="Intruder dimensions", columns=COLUMNS, rows=rows)
    return Section("Intruder dimensions", WORDS, [table]) if rows else None
