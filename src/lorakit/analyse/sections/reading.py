"""Texts on which base and adapter disagree, token by token."""

from __future__ import annotations

import math

from lorakit.analyse.examples import Disagreement, Place
from lorakit.analyse.page import Figure, Section, Table, Tokens
from lorakit.analyse.study import Study

WORDS = """
Every token is coloured by how much the adapter changes what is predicted after it (the divergence D(adapter ‖ base),
in nats); pointing at one shows which next tokens became more or less probable. The texts come in the order of their
mean divergence.
"""
COLUMNS = ["text", "mean divergence", "probability of the target, base", "adapter"]


def section(study: Study) -> Section | None:
    """A table of the texts, then the texts themselves."""
    figures = [figure for name, found in study.disagreements.items() if found
               for figure in _adapter(name, list(found))]  # fmt: skip
    return Section("Where base and adapter disagree", WORDS, figures) if figures else None


def _adapter(name: str, found: list[Disagreement]) -> list[Figure]:
    rows: list[list[str | float]] = []
    for number, each in enumerate(found, 1):
        before, after = (math.exp(value) for value in each.target) if each.target else (math.nan, math.nan)
        rows.append([f"{number}", each.mean, before, after])
    texts = [_text(name, number, each) for number, each in enumerate(found, 1)]
    return [Table(title=f"Texts read with {name}", columns=COLUMNS, rows=rows), *texts]


def _text(name: str, number: int, each: Disagreement) -> Tokens:
    notes = {place.position: _note(place) for place in each.places}
    told = enumerate(zip(each.tokens, each.divergences, strict=True))
    tokens = [(token, value, notes.get(position, "")) for position, (token, value) in told]
    return Tokens(title=f"Text {number}, {name}", value="divergence", tokens=tokens)


def _note(place: Place) -> str:
    """What is predicted next, before and after."""
    return "; ".join(f"{each.token!r} {each.before:.2f} → {each.after:.2f}" for each in place.predictions[:3])
