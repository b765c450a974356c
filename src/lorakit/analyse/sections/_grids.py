"""Figures that several sections draw: numbers by layer and role."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from lorakit.analyse.page import HeatMap
from lorakit.analyse.spectra import ByLayer, Spectrum, by_layer

OUTSIDE = "in none"


def by_depth(
    title: str, found: Mapping[str, Sequence[Spectrum]], number: Callable[[Spectrum], float], value: str
) -> list[HeatMap]:
    """A property of spectra, a panel for each adapter."""
    return depth_map(title, {name: by_layer(own, number) for name, own in found.items()}, value)


def depth_map(
    title: str, tables: Mapping[str, ByLayer], value: str, scale: tuple[float, float] | None = None
) -> list[HeatMap]:
    """Tables by layer and role as the panels of one heat map, over all layers and roles that any of them has.

    What lies in no layer has a row of its own, the last.
    """
    there = {layer for table in tables.values() for layer in table.layers}
    layers = sorted(there, key=lambda layer: (layer is None, layer or 0))
    roles = list(dict.fromkeys(role for table in tables.values() for role in table.roles))
    panels = {}
    for name, table in tables.items():
        grid_LT = torch.full((len(layers), len(roles)), torch.nan, dtype=torch.float64)
        for row, layer in enumerate(table.layers):
            for column, role in enumerate(table.roles):
                grid_LT[layers.index(layer), roles.index(role)] = table.values_LT[row, column]
        panels[name] = grid_LT
    if not layers:
        return []
    labels = [OUTSIDE if layer is None else str(layer) for layer in layers]
    return [HeatMap(title=title, panels=panels, value=value, x="role", y="layer", x_labels=roles, y_labels=labels,
                    scale=scale)]  # fmt: skip
