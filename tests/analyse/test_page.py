"""Figures know their numbers: what CSV says is what was given, bit for bit; figures that make no sense are refused."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable

import pytest
import torch

from lorakit.analyse.page import Bars, Figure, HeatMap, Lines, Table, Tokens

HOSTILE = 'a "quoted", name\r\nwith lines'
ODD = [0.1, 1 / 3, 1e-300, -0.0, 5e-324, 1e22]


def rows(figure: Figure) -> list[list[str]]:
    return list(csv.reader(io.StringIO(figure.csv(), newline="")))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cells_of_a_heat_map_read_back_bit_for_bit(dtype: torch.dtype) -> None:
    grid = torch.randn(3, 5, dtype=dtype)
    figure = HeatMap(title="t", panels={HOSTILE: grid, "other": grid[:2]}, value="v", x="j", y="i")
    header, *cells = rows(figure)
    assert header == ["panel", "i", "j", "v"]
    for name, expected in ((HOSTILE, grid), ("other", grid[:2])):
        read = torch.full_like(expected, math.nan)
        for _, i, j, value in (row for row in cells if row[0] == name):
            read[int(i) - 1, int(j) - 1] = float(value)
        assert torch.equal(read, expected)


def test_cells_are_named_by_labels_and_empty_ones_say_so() -> None:
    grid = torch.tensor([[1.0, math.nan]])
    figure = HeatMap(title="t", panels={"p": grid}, value="v", x="x", y="y", x_labels=["q", HOSTILE], y_labels=["0"])
    assert rows(figure)[1:] == [["p", "0", "q", "1.0"], ["p", "0", HOSTILE, "nan"]]


def test_points_of_lines_read_back_and_short_lines_end() -> None:
    figure = Lines(title="t", x="x", y="y", at=range(6), lines={HOSTILE: ODD, "short": torch.tensor(ODD[:2])})
    header, *points = rows(figure)
    assert header == ["line", "x", "y"]
    assert [(int(x), float(y).hex()) for name, x, y in points if name == HOSTILE] == [
        (x, y.hex()) for x, y in enumerate(ODD)
    ]
    assert [name for name, _, _ in points].count("short") == 2


def test_bars_tables_and_tokens_read_back() -> None:
    assert rows(Bars(title="t", label="l", value="v", labels=["q", HOSTILE], bars={"s": [1, 0.1]})) == [
        ["bar", "l", "v"],
        ["s", "q", "1"],
        ["s", HOSTILE, "0.1"],
    ]
    assert rows(Table(title="t", columns=["a", "b"], rows=[[HOSTILE, 1 / 3]])) == [["a", "b"], [HOSTILE, repr(1 / 3)]]
    assert rows(Tokens(title="t", value="v", tokens=[(HOSTILE, -0.5, "n")]))[1] == ["1", HOSTILE, "-0.5", "n"]


def _heat_map(panels: dict[str, torch.Tensor], **labels: list[str]) -> HeatMap:
    return HeatMap(title="the title", panels=panels, value="v", x="x", y="y", **labels)


@pytest.mark.parametrize(
    ("build", "fault"),
    [
        (lambda: _heat_map({}), "no panel"),
        (lambda: _heat_map({"p": torch.zeros(3)}), r"'p' has shape \(3,\)"),
        (lambda: _heat_map({"p": torch.zeros(0, 3)}), r"'p' has shape \(0, 3\)"),
        (lambda: _heat_map({"p": torch.zeros(2, 2)}, x_labels=["a"]), "0 labels of rows and 1 of columns"),
        (lambda: _heat_map({"p": torch.zeros(2, 1)}, y_labels=["a", "a"]), "labels of rows repeat"),
        (lambda: Lines(title="the title", x="x", y="y", at=[1], lines={"l": [1, 2]}), "'l' has 2 values for 1"),
        (lambda: Lines(title="the title", x="x", y="y", at=[1], lines={}, dashed=["l"]), "no line 'l'"),
        (lambda: Lines(title="the title", x="x", y="y", at=[1], lines={}, log="z"), "log is 'z'"),
        (lambda: Bars(title="the title", label="l", value="v", labels=["a"], bars={"s": []}), "'s' has 0 values for 1"),
        (lambda: Bars(title="the title", label="l", value="v", labels=["a", "a"], bars={}), "labels of bars repeat"),
        (lambda: Table(title="the title", columns=["a"], rows=[["b"], ["c", 1]]), "row 2 has 2 cells for 1 columns"),
        (lambda: Table(title="the title", columns=[], rows=[]), "no column"),
    ],
)
def test_a_figure_that_makes_no_sense_is_refused_by_name(build: Callable[[], Figure], fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as raised:
        build()
    assert "the title" in str(raised.value)
