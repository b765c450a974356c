"""Sites of methods that act on matrices applied to vectors: `nn.Linear`, GPT-2's `Conv1D`, and slices of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lorakit.core.layouts import Layout, LinearLayout, kind_of, layout_of
from lorakit.core.plan import Placement
from lorakit.core.sites import Site, matching, resolve
from lorakit.errors import BadMethod


def linear_sites(name: str, model: nn.Module, targets: Iterable[str]) -> list[Site]:
    """The linear layers (and slices of them) that targets name; every target names at least one.

    Raises:
        NoSuchTarget: a target that matches nothing.
        BadMethod: one that matches no linear layer, or others besides (embeddings, convolutions, stacked experts).
    """
    sites = resolve(model, targets)
    for target in targets:
        matched = [site for site in matching(sites, target, model) if site.has_matrix]
        wrong = [site for site in matched if not isinstance(site.layout, LinearLayout)]
        if wrong or not matched:
            named = wrong or matching(sites, target, model)
            kinds = {_kind(site, model) for site in named}
            raise BadMethod(f"{name} needs Linear or Conv1D layers, but {target!r} names {', '.join(sorted(kinds))}")
    return [site for site in sites if site.has_matrix]


def _kind(site: Site, model: nn.Module) -> str:
    return "stacked experts" if site.experts else kind_of(model.get_submodule(site.path))


def linear_layout(placement: Placement, module: nn.Module) -> Layout:
    """The layout of a placement's linear layer (a file may name any module).

    Raises:
        BadMethod: it is no linear layer.
    """
    layout = layout_of(module)
    if not isinstance(layout, LinearLayout):
        raise BadMethod(f"{placement.path} is a {kind_of(module)}, but {placement.kind} needs a Linear or Conv1D")
    return layout


def out_features(placement: Placement, layout: Layout) -> int:
    """Output units of a placement: those of its slice, or of the whole layer."""
    return placement.slice.width if placement.slice else layout.out_features
