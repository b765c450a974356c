"""Figures of a report as Plotly's: what is drawn, and the sizes by which the page's script lays it out.

The script gives each figure the width there is, sets panels beside or under each other, and colours background and
text. Plotly reads tags, entities and %{fields} in text, so all of it goes through `literal`.
"""

from __future__ import annotations

import json
import math
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import singledispatch
from typing import Any

from lorakit.analyse.page import Bars, Cell, Figure, HeatMap, Lines, Table, Tokens, plain
from lorakit.errors import MissingPackage

Drawn = dict[str, Any]

RISING, DIVERGING = "Viridis", "RdBu_r"
# About equally bright: each stands out from white and from black.
HUES = ("#3b82d6", "#0d94a5", "#1b9a5a", "#7d8f14", "#b97f0a", "#dd6b20", "#e0555f", "#cf57a8", "#8f6fe0")
FEW = tuple(HUES[index] for index in (0, 5, 2, 8, 4, 7))
GREY = "#888888"
FEW_POINTS = 12  # of a line, so few that each is marked
KEYED = 12  # lines that a legend names one by one; of more it names six
ABOVE, BELOW = "224,112,20", "58,128,232"  # tokens above and below zero
STRONGEST = 0.6  # opacity of the strongest token, whose text can still be read on light and dark
LINE = 84  # characters of a line of tokens in a picture
LITERAL = {ord(sign): f"&#{ord(sign)};" for sign in "&<>%"}


def plotly() -> Any:
    """The package, with those of its parts that are used here.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        import plotly.colors
        import plotly.graph_objects
        import plotly.offline
    except ImportError as error:
        raise MissingPackage("a report needs Plotly; pip install 'lorakit[analyse]'") from error
    return plotly


def plot(figure: Figure) -> Drawn:
    """Plotly's `data` and `layout` of a figure, with its `title`, its `kind` and what that is laid out by; all JSON.

    Raises:
        MissingPackage: Plotly is not installed.
    """
    drawn = _drawn(figure)
    checked = plotly().graph_objects.Figure({"data": drawn["data"], "layout": {**drawn["layout"], "template": {}}})
    title = "<br>".join(map(literal, textwrap.wrap(figure.title, 80)))
    return {**drawn, **json.loads(checked.to_json()), "title": title}


def literal(text: str) -> str:
    """Text that Plotly shows as it is.

    >>> literal("<b>50%</b>")
    '&#60;b&#62;50&#37;&#60;/b&#62;'
    """
    return text.translate(LITERAL)


def shown(cell: Cell) -> str:
    """A cell for reading: numbers to four significant digits.

    >>> [shown(cell) for cell in (0.123456, 21.5, 12345678, 0.00001234, -3.0, "r = -8")]
    ['0.1235', '21.5', '12,345,678', '1.234e−5', '−3', 'r = -8']
    """
    if isinstance(cell, str):
        return cell
    mantissa, _, exponent = (f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}").partition("e")
    return (f"{mantissa}e{int(exponent)}" if exponent else mantissa).replace("-", "−")


@singledispatch
def _drawn(figure: Any) -> Drawn:
    raise TypeError(f"{type(figure).__name__} is no figure of a report")


@_drawn.register
def _(figure: HeatMap) -> Drawn:
    axes: Drawn = {}
    for number in map(_number, range(len(figure.panels))):
        bare = {"showgrid": False, "zeroline": False}
        axes[f"xaxis{number}"] = {**bare, **_kind(figure.x_labels), "anchor": f"y{number}"}
        axes[f"yaxis{number}"] = {**bare, **_kind(figure.y_labels), "anchor": f"x{number}", "autorange": "reversed"}
    sizes = [{"name": name, "rows": len(grid), "columns": grid.shape[1]} for name, grid in figure.panels.items()]
    return {
        "kind": "grids",
        "data": [_grid(figure, index, name) for index, name in enumerate(figure.panels)],
        "layout": {"coloraxis": _colours(figure), **axes},
        "panels": sizes,
        "labels": {"rows": list(figure.y_labels), "columns": list(figure.x_labels)},
        "axes": {"x": figure.x, "y": figure.y},
    }


def _grid(figure: HeatMap, index: int, name: str) -> Drawn:
    rows, columns = figure.panels[name].shape
    apart = 1 if figure.x_labels and figure.y_labels else 0
    return {
        **{"type": "heatmap", "z": _short(figure.panels[name].tolist()), "xgap": apart, "ygap": apart},
        **{"x": _places(figure.x_labels, columns), "y": _places(figure.y_labels, rows)},
        **{"xaxis": f"x{_number(index)}", "yaxis": f"y{_number(index)}", "coloraxis": "coloraxis"},
        "hovertemplate": _hover(name, (figure.y, "y"), (figure.x, "x"), (figure.value, "z")),
    }


def _number(index: int) -> str:
    return str(index + 1) if index else ""


def _kind(labels: Sequence[str]) -> Drawn:
    return {"type": "category" if labels else "linear"}


def _places(labels: Sequence[str], count: int) -> list[str] | list[int]:
    return [literal(label) for label in labels] if labels else list(range(1, count + 1))


def _hover(name: str, *fields: tuple[str, str]) -> str:
    """What is shown of a point: the name, and a line for each field, the last its number."""
    *places, (value, field) = [(literal(called), field) for called, field in fields]
    lines = [literal(name), *(f"{called}: %{{{field}}}" for called, field in places)]
    return "<br>".join([*lines, f"<b>{value}: %{{{field}:.4g}}</b>"]) + "<extra></extra>"


def _colours(figure: HeatMap) -> Drawn:
    low, high = figure.scale or _ends(v for grid in figure.panels.values() for v in grid.flatten().tolist())
    if crosses := low < 0 < high:
        low, high = -max(-low, high), max(-low, high)
    title = {"text": literal(figure.value), "side": "top"}
    place = {"orientation": "h", "x": 1, "xanchor": "right", "yanchor": "bottom", "xpad": 0, "ypad": 0}
    size = {"thickness": 10, "len": 200, "lenmode": "pixels", "nticks": 5, "outlinewidth": 0}
    bar = {"title": title, **place, **size}
    return {"cmin": low, "cmax": high, "colorscale": DIVERGING if crosses else RISING, "colorbar": bar}


def _ends(values: Iterable[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    return low, (high if high > low else low + 1)


@_drawn.register
def _(figure: Lines) -> Drawn:
    solid = [name for name in figure.lines if name not in figure.dashed]
    colours = dict(zip(solid, _several(len(solid)), strict=True))
    step = (len(solid) - 1) / 5
    keyed = solid if len(solid) <= KEYED else [solid[round(index * step)] for index in range(6)]
    traces = [_line(figure, name, colours.get(name)) for name in figure.lines]
    for name, trace in zip(figure.lines, traces, strict=True):
        trace["showlegend"] = name in keyed or name in figure.dashed
    values = {side: [value for trace in traces for value in trace[side]] for side in "xy"}
    return {
        "kind": "chart",
        "data": traces,
        "layout": {f"{side}axis": _axis(side in figure.log, values[side]) for side in "xy"},
        "height": 340,
        "names": list(figure.lines),
        "labels": [],
        "axes": {"x": figure.x, "y": figure.y},
    }


def _line(figure: Lines, name: str, colour: str | None) -> Drawn:
    values = _short(plain(figure.lines[name]))
    line = {"color": colour} if colour else {"color": GREY, "dash": "dash"}
    points = colour is not None and len(values) <= FEW_POINTS
    return {
        **{"type": "scatter", "name": literal(name), "x": _short(plain(figure.at)[: len(values)]), "y": values},
        **{"mode": "lines+markers" if points else "lines", "marker": {"size": 5}},
        **{"line": {"width": 1.75, **line}, "hovertemplate": _hover(name, (figure.x, "x"), (figure.y, "y"))},
    }


def _axis(in_logarithms: bool, values: Sequence[float | None]) -> Drawn:
    """An axis; one in logarithms that spans decades has their powers written, no others."""
    if not in_logarithms:
        return {"type": "linear"}
    low, high = _ends(value for value in values if value and value > 0)
    return {"type": "log", **({"dtick": 1, "tickfont": {"size": 10}} if high > 100 * low else {})}


@_drawn.register
def _(figure: Bars) -> Drawn:
    labels, colours = [literal(label) for label in figure.labels], _several(len(figure.bars))
    return {
        "kind": "chart",
        "data": [
            {
                **{"type": "bar", "orientation": "h", "name": literal(name), "marker": {"color": colour}},
                **{"x": _short(plain(values)), "y": labels},
                "hovertemplate": _hover(name, (figure.label, "y"), (figure.value, "x")),
            }
            for (name, values), colour in zip(figure.bars.items(), colours, strict=True)
        ],
        "layout": {"xaxis": {}, "yaxis": {"type": "category", "autorange": "reversed"}, "bargap": 0.25},
        "height": max(120, len(labels) * (8 + 14 * len(figure.bars))),
        "names": list(figure.bars),
        "labels": list(figure.labels),
        "axes": {"x": figure.value, "y": figure.label},
    }


def _several(count: int) -> Sequence[str]:
    """So many colours: few that differ most, or many in the order of their hues."""
    if count <= len(FEW):
        return FEW[:count]
    return plotly().colors.sample_colorscale(list(HUES), [index / (count - 1) for index in range(count)])


@_drawn.register
def _(figure: Table) -> Drawn:
    """As a picture to save; the page has a table of its own."""
    columns = [[shown(row[index]) for row in figure.rows] for index in range(len(figure.columns))]
    widths = [max(map(len, (head, *column))) + 2 for head, column in zip(figure.columns, columns, strict=True)]
    sides = ["right" if number else "left" for number in numeric(figure)]
    cells = {"values": [[literal(cell) for cell in column] for column in columns], "height": 26, "align": sides}
    header = {"values": [f"<b>{literal(head)}</b>" for head in figure.columns], "height": 28, "align": sides}
    table = {"type": "table", "columnwidth": widths, "header": header, "cells": cells}
    size = {"width": max(480, 9 * sum(widths)), "height": 58 + 26 * len(figure.rows)}
    return {"kind": "picture", "data": [table], "layout": size}


def numeric(figure: Table) -> list[bool]:
    """Which columns of a table hold numbers."""
    columns = range(len(figure.columns))
    return [any(isinstance(row[column], int | float) for row in figure.rows) for column in columns]


@_drawn.register
def _(figure: Tokens) -> Drawn:
    """As a picture to save, in letters of one width; the page has a text of its own."""
    placed = list(_placed(text for text, _, _ in figure.tokens))
    shapes = [
        {"type": "rect", "x0": x, "x1": x + _width(text), "y0": y, "y1": y + 0.9}
        | {"fillcolor": colour, "layer": "below", "line": {"width": 0}}
        for (text, x, y), colour in zip(placed, token_colours(figure), strict=True)
    ]
    (low, high), lines = token_range(figure), max((y for _, _, y in placed), default=0) + 3
    key = f"{figure.value}: from {shown(low)}{' (blue) over 0' if low else ''} to {shown(high)} (orange)"
    texts, across, down = zip(*placed, (key, 0, lines - 1), strict=True)
    words = {"x": across, "y": [y + 0.45 for y in down], "text": [literal(text) for text in texts]}
    look = {"mode": "text", "textposition": "middle right", "textfont": {"family": "monospace", "size": 14}}
    axes = {"xaxis": {"visible": False, "range": [0, LINE]}, "yaxis": {"visible": False, "range": [lines, 0]}}
    layout = {"width": 40 + round(8.43 * LINE), "height": 20 + 24 * lines, "shapes": shapes, **axes}
    return {"kind": "picture", "data": [{"type": "scatter", **look, **words}], "layout": layout}


def token_colours(figure: Tokens) -> list[str]:
    """A background for every token: orange above zero, blue below, stronger the further from it."""
    _, greatest = token_range(figure)
    return [token_colour(value / greatest if math.isfinite(value) else 0.0) for _, value, _ in figure.tokens]


def token_colour(share: float) -> str:
    """The background of a token whose number is this share of the one furthest from zero.

    >>> token_colour(-1.0)
    'rgba(58,128,232,0.600)'
    """
    return f"rgba({ABOVE if share > 0 else BELOW},{STRONGEST * abs(share):.3f})"


def token_range(figure: Tokens) -> tuple[float, float]:
    """The numbers of the strongest colours: zero, or as far below it as above; and the furthest from it."""
    values = [value for _, value, _ in figure.tokens if math.isfinite(value)]
    greatest = max(map(abs, values), default=0.0) or 1.0
    return (-greatest if any(value < 0 for value in values) else 0.0), greatest


def visible(token: str) -> str:
    """A token with its line ends and tabs drawn."""
    return token.replace("\n", "⏎").replace("\t", "⇥")


def _placed(tokens: Iterable[str]) -> Iterator[tuple[str, int, int]]:
    """Every token as (visible text, column, line)."""
    x = y = 0
    for token in tokens:
        text = visible(token)
        if x and x + _width(text) > LINE:
            x, y = 0, y + 1
        yield text, x, y
        x, y = (0, y + 1) if token.endswith("\n") else (x + _width(text), y)


def _width(text: str) -> int:
    """How many columns a text takes.

    >>> _width("word"), _width("言葉")
    (4, 4)
    """
    return sum((unicodedata.east_asian_width(sign) in "WF") + (not unicodedata.combining(sign)) for sign in text)


def _short(values: Any) -> Any:
    """Numbers of any nesting to the five digits that a picture can show; what is not finite is left out."""
    if isinstance(values, list):
        return [_short(value) for value in values]
    return float(f"{values:.5g}") if math.isfinite(values) else None
