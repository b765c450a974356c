"""Smooth and sparse patterns of the updates over depth."""

from __future__ import annotations

from lorakit.analyse.depth import LEAST_LAYERS, over_depth, patterns
from lorakit.analyse.page import Figure, Lines, Section
from lorakit.analyse.study import Study
from lorakit.core.exchange import Factored

WORDS = """
Every channel of the residual stream has a profile over depth: how much the update of each layer has to do with it.
Few patterns, smooth over the layers or zero in most of them (the structured components of the initialisation
`structured`), from which nearly all profiles are mixed say whether an adapter works at one depth, at all, or
gradually.
"""
COUNT = 2
OUTWARD = ("o_proj", "down_proj", "c_proj", "dense", "fc2", "wo", "w2", "out_proj")  # write into the residual stream


def section(study: Study) -> Section | None:
    """The patterns of each role, adapter by adapter."""
    figures = [figure for name, own in study.matrices.items() for figure in _adapter(name, own)]
    return Section("Patterns over depth", WORDS, figures) if figures else None


def _adapter(name: str, own: list[Factored]) -> list[Figure]:
    figures: list[Figure] = []
    for role in dict.fromkeys(each.role for each in own):
        group = [each for each in own if each.role == role]
        layers, shapes = {each.layer for each in group}, {each.shape for each in group}
        if len(layers) == len(group) >= LEAST_LAYERS and None not in layers and len(shapes) == 1:
            figures.append(_figure(name, role, group))
    return figures


def _figure(name: str, role: str, group: list[Factored]) -> Lines:
    layers, norms_LF = over_depth(group, "output" if role.endswith(OUTWARD) else "input")
    found = patterns(norms_LF, COUNT, layers)
    told = {f"pattern {k + 1}, {100 * float(share):.0f} % of the variance": found.patterns_LK[:, k].tolist()
            for k, share in enumerate(found.explained_K)}  # fmt: skip
    mean = {"mean profile": (found.mean_L / found.mean_L.norm()).tolist()}
    title = f"{role} of {name} over depth"
    return Lines(title=title, x="layer", y="weight", at=list(layers), lines=mean | told, dashed=list(mean))
