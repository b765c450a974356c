"""What the adapters do on given text: layers, units, heads and tokens that they move most."""

from __future__ import annotations

from collections import Counter

import torch

from lorakit.analyse.effect import Effect
from lorakit.analyse.page import Bars, Figure, HeatMap, Lines, Section
from lorakit.analyse.study import Study

WORDS = """
On the text that was given: "local" is what the adapter adds to a layer's output, relative to that output, on the same
input; "drift" is how far the hidden states after each block have moved from the base's, all earlier layers included.

A head is bright where the adapter moves what it reads or hands on. The divergence of a token is that of the
predictions after it, D(adapter ‖ base) in nats.
"""
MOST = 16  # units and tokens that are listed


def section(study: Study) -> Section | None:
    """Drift and local effect over depth, heads, and the units and tokens moved most."""
    if not study.effects:
        return None
    figures: list[Figure] = [*_drift(study), *_local(study)]
    for name, found in study.effects.items():
        figures += [*_heads(study, name, found), _units(name, found), *_tokens(study, name, found)]
    return Section("What the adapters do on text", WORDS, figures)


def _drift(study: Study) -> list[Lines]:
    lines = {name: [each.drift for each in found.blocks] for name, found in study.effects.items()}
    at = list(range(max(len(line) for line in lines.values())))
    return [Lines(title="Drift of the hidden states", x="block", y="‖x' - x‖ / ‖x‖", at=at, lines=lines)] if at else []


def _local(study: Study) -> list[Lines]:
    lines: dict[str, list[float]] = {}
    layers = sorted({e.layer for found in study.effects.values() for e in found.layers if e.layer is not None})
    for name, found in study.effects.items():
        for each in found.layers:
            if each.layer is not None:
                own = lines.setdefault(f"{name}, {study.role(each.path)}", [float("nan")] * len(layers))
                own[layers.index(each.layer)] = each.local
    return [Lines(title="What each layer adds", x="layer", y="‖Δ‖ / ‖y‖", at=layers, lines=lines)] if lines else []


def _heads(study: Study, name: str, found: Effect) -> list[Figure]:
    rows: dict[str, dict[int, torch.Tensor]] = {}
    for each in found.layers:
        for role, heads_H in each.heads.items():
            if each.layer is not None and len(heads_H):
                own = study.role(each.path) if len(each.heads) == 1 else study.role(each.path, role)
                rows.setdefault(f"{own}, what is added", {})[each.layer] = heads_H
    for head in found.heads:
        if head.layer is not None and len(head.heads_H):
            rows.setdefault("what heads hand on, drift", {})[head.layer] = head.heads_H
    return [_map(f"Heads of {name}: {title}", name, by_layer) for title, by_layer in rows.items()]


def _map(title: str, name: str, by_layer: dict[int, torch.Tensor]) -> HeatMap:
    grid_LH = torch.stack(list(by_layer.values()))
    heads, layers = [str(number) for number in range(grid_LH.shape[1])], [str(layer) for layer in by_layer]
    return HeatMap(title=title, panels={name: grid_LH}, value="relative change", x="head", y="layer", x_labels=heads,
                   y_labels=layers)  # fmt: skip


def _units(name: str, found: Effect) -> Bars:
    """The output units with the largest root mean square of what is added, over all layers."""
    most: list[tuple[float, str]] = []
    for each in found.layers:
        values, units = each.added_O.topk(min(MOST, len(each.added_O)))
        most += [(float(value), f"{each.path}[{int(unit)}]") for value, unit in zip(values, units, strict=True)]
    most = sorted(most, reverse=True)[:MOST]
    return Bars(title=f"Output units that {name} moves most", label="unit", value="root mean square of what is added",
                labels=[label for _, label in most], bars={name: [value for value, _ in most]})  # fmt: skip


def _tokens(study: Study, name: str, found: Effect) -> list[Figure]:
    tokens = found.tokens
    if tokens is None:
        return []
    by = tokens.drift_V if tokens.divergence_V is None else tokens.divergence_V
    values, places = by.topk(min(MOST, len(by)))
    labels = _told_apart([(study.token(number), number) for number in tokens.ids_V[places].tolist()])
    what = "drift" if tokens.divergence_V is None else "divergence"
    title = f"Tokens after which {name} changes most"
    return [Bars(title=title, label="token", value=f"mean {what}", labels=labels, bars={name: values})]


def _told_apart(tokens: list[tuple[str, int]]) -> list[str]:
    """Texts of tokens, with their ids where several have one text (parts of a character)."""
    count = Counter(text for text, _ in tokens)
    return [text if count[text] == 1 else f"{text} ({number})" for text, number in tokens]
