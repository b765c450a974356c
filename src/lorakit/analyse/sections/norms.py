"""How large the updates are, by layer and role."""

from __future__ import annotations

from lorakit.analyse.page import Section, Table
from lorakit.analyse.sections._grids import by_depth
from lorakit.analyse.study import Study

WORDS = """
‖ΔW‖_F of every matrix, the scale alpha / r included: how far the adapter moves a weight. A dark row or column is a
layer or role that training hardly used; a matrix whose update is zero is dead, and could be left out of the targets.
"""


def section(study: Study) -> Section | None:
    """Norms as a heat map, and what each adapter is in numbers."""
    rows = []
    for name, own in study.spectra.items():
        dead = [each.name for each in own if each.dead]
        total = sum(each.norm**2 for each in own) ** 0.5
        told = f"{len(dead)}: {', '.join(dead[:3])}" if dead else "none"
        rows.append([name, len(own), sum(each.rank for each in own), total, told])
    columns = ["adapter", "matrices", "sum of ranks", "‖ΔW‖_F of all together", "dead matrices"]
    table = Table(title="The adapters", columns=columns, rows=rows)
    maps = by_depth("Norm of the updates", study.spectra, lambda each: each.norm, "‖ΔW‖_F")
    return Section("How much is changed, and where", WORDS, [table, *maps])
