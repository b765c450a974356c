"""Smooth and sparse patterns of the updates over depth."""

from __future__ import annotations

from torch import Tensor

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
OUTWARD = (  # what writes into the residual stream; all else reads it
    *(".o", "o_proj", "out_proj", "c_proj", "output.dense", "attention.dense", "self_attn.dense"),
    *(".wo", "w2", "fc2", "fc_out", "down_proj", "dense_4h_to_h", "ffn.lin2", "attention.out_lin"),
)


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
            figures += _figure(name, role, group)
    return figures


def _figure(name: str, role: str, group: list[Factored]) -> list[Figure]:
    layers, norms_LF = over_depth(group, "output" if role.endswith(OUTWARD) else "input")
    if norms_LF.shape[1] < COUNT or not _differ(norms_LF):
        return []
    found = patterns(norms_LF, COUNT, layers)
    told = {f"pattern {k + 1}, {100 * float(share):.0f} % of the variance": found.patterns_LK[:, k].tolist()
            for k, share in enumerate(found.explained_K)}  # fmt: skip
    mean = {"mean profile": (found.mean_L / found.mean_L.norm()).tolist()}
    title = f"{role} of {name} over depth"
    return [Lines(title=title, x="layer", y="weight", at=list(layers), lines=mean | told, dashed=list(mean))]


def _differ(norms_LF: Tensor) -> bool:
    """Whether units have profiles of their own; those of a dead role have not."""
    return bool((norms_LF - norms_LF.mean(1, keepdim=True)).norm() > 1e-6 * norms_LF.norm())
