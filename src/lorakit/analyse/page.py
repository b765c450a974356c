"""What a report says, before anything is drawn: sections of words, and figures that know their numbers.

Every figure gives its numbers as CSV (RFC 4180): a header, one observation a row, numbers that read back bit for bit.

H rows, W columns.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

Cell = str | int | float
Numbers = Sequence[float] | Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class HeatMap:
    """Grids in one colour scale, each a named panel, first row on top; NaN is an empty cell.

    Labels are common to all panels; without them rows and columns are counted from 1, and panels may differ in size.
    A scale across zero is made symmetric, so that zero has the colour between.

    Raises:
        ValueError: no panel, a panel that is no grid, or labels that repeat or do not fit.

    >>> import torch
    >>> print(HeatMap(title="φ", panels={"A": torch.eye(2)}, value="φ", x="j", y="i", scale=(0, 1)).csv())
    panel,i,j,φ
    A,1,1,1.0
    A,1,2,0.0
    A,2,1,0.0
    A,2,2,1.0
    """

    title: str
    panels: Mapping[str, Tensor]  # (H, W) each; a baseline is one panel more
    value: str  # what a cell's number is called; so are columns (x) and rows (y)
    x: str
    y: str
    x_labels: Sequence[str] = ()
    y_labels: Sequence[str] = ()
    scale: tuple[float, float] | None = None  # numbers of the first and last colour; None: the least and greatest

    def __post_init__(self) -> None:
        faults = _repeats(columns=self.x_labels, rows=self.y_labels)
        faults += [] if self.panels else ["it has no panel"]
        for name, grid in self.panels.items():
            fits = zip((self.y_labels, self.x_labels), grid.shape, strict=False)
            if grid.ndim != 2 or not grid.numel():
                faults.append(f"panel {name!r} has shape {tuple(grid.shape)}, not (rows, columns)")
            elif any(labels and len(labels) != size for labels, size in fits):
                given = f"{len(self.y_labels)} labels of rows and {len(self.x_labels)} of columns"
                faults.append(f"panel {name!r} has shape {tuple(grid.shape)}, and there are {given}")
        _refuse(self.title, faults)

    def csv(self) -> str:
        """One row a cell: panel, row, column, value."""
        return _csv([("panel", self.y, self.x, self.value)], self._cells())

    def _cells(self) -> Iterable[Sequence[Cell]]:
        for panel, grid_HW in self.panels.items():
            for row, values in enumerate(grid_HW.tolist()):
                for column, value in enumerate(values):
                    yield panel, _named(self.y_labels, row), _named(self.x_labels, column), value


@dataclass(frozen=True, kw_only=True, eq=False)
class Lines:
    """Named lines over common x values; a line may end before them, as spectra of several ranks do.

    Raises:
        ValueError: a line longer than its x values, one to be dashed that is not there, or an axis that is none.

    >>> print(Lines(title="σ", x="index", y="σ", at=[1, 2], lines={"q": [3.0, 0.5], "v": [2.0]}, log="y").csv())
    line,index,σ
    q,1,3.0
    q,2,0.5
    v,1,2.0
    """

    title: str
    x: str
    y: str
    at: Numbers
    lines: Mapping[str, Numbers]
    dashed: Collection[str] = ()  # names of the lines that are baselines
    log: str = ""  # the axes drawn in logarithms: "x", "y" or "xy"

    def __post_init__(self) -> None:
        long = {name: len(values) for name, values in self.lines.items() if len(values) > len(self.at)}
        faults = [f"line {name!r} has {n} values for {len(self.at)} of {self.x}" for name, n in long.items()]
        faults += [f"it has no line {name!r} to dash" for name in self.dashed if name not in self.lines]
        faults += [] if self.log in ("", "x", "y", "xy") else [f"log is {self.log!r}, not x, y or xy"]
        _refuse(self.title, faults)

    def csv(self) -> str:
        """One row a point: line, x, y."""
        at = plain(self.at)
        points = ((name, x, y) for name, values in self.lines.items() for x, y in zip(at, plain(values), strict=False))
        return _csv([("line", self.x, self.y)], points)


@dataclass(frozen=True, kw_only=True, eq=False)
class Bars:
    """For every label one bar of each series, drawn sideways so that long labels can be read.

    Raises:
        ValueError: labels that repeat, or a series of another length.

    >>> print(Bars(title="Norms", label="site", value="‖ΔW‖", labels=["q", "v"], bars={"reviews": [1.5, 2.0]}).csv())
    bar,site,‖ΔW‖
    reviews,q,1.5
    reviews,v,2.0
    """

    title: str
    label: str  # what the labels are called, and the numbers
    value: str
    labels: Sequence[str]
    bars: Mapping[str, Numbers]

    def __post_init__(self) -> None:
        wrong = {name: len(values) for name, values in self.bars.items() if len(values) != len(self.labels)}
        faults = [f"series {name!r} has {n} values for {len(self.labels)} labels" for name, n in wrong.items()]
        _refuse(self.title, faults + _repeats(bars=self.labels))

    def csv(self) -> str:
        """One row a bar: series, label, value."""
        rows = ((n, label, v) for n, vs in self.bars.items() for label, v in zip(self.labels, plain(vs), strict=True))
        return _csv([("bar", self.label, self.value)], rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Rows of words and numbers; the first cell names its row.

    Raises:
        ValueError: no column, or a row of another length than the header.

    >>> print(Table(title="Table 7", columns=["directions of", "value"], rows=[["ΔW", 0.32], ["random", 0.02]]).csv())
    directions of,value
    ΔW,0.32
    random,0.02
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def __post_init__(self) -> None:
        wrong = [(number, len(row)) for number, row in enumerate(self.rows, 1) if len(row) != len(self.columns)]
        faults = [] if self.columns else ["it has no column"]
        faults += [f"row {number} has {n} cells for {len(self.columns)} columns" for number, n in wrong]
        _refuse(self.title, faults)

    def csv(self) -> str:
        """The table as it is."""
        return _csv([self.columns], self.rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """A text whose tokens are coloured by a number, each with a note that is shown when it is pointed at.

    >>> print(Tokens(title="Review 1", value="change", tokens=[("A", 0.0, ""), (" dull", -1.25, "base: good")]).csv())
    position,token,change,note
    1,A,0.0,
    2, dull,-1.25,base: good
    """

    title: str
    value: str
    tokens: Sequence[tuple[str, float, str]]  # text, number, note

    def csv(self) -> str:
        """One row a token: position from 1, text, value, note."""
        rows = ((position, *token) for position, token in enumerate(self.tokens, 1))
        return _csv([("position", "token", self.value, "note")], rows)


Figure = HeatMap | Lines | Bars | Table | Tokens


@dataclass(frozen=True, eq=False)
class Section:
    """A heading, what is shown and what it means in paragraphs with empty lines between and `code`, and figures."""

    title: str
    words: str = ""
    figures: Sequence[Figure] = ()


@dataclass(frozen=True, eq=False)
class Page:
    """A report: its title, facts as (name, value), and its sections."""

    title: str
    facts: Sequence[tuple[str, Cell]] = ()
    sections: Sequence[Section] = ()


def plain(values: Numbers) -> list[float]:
    """Python's own numbers of a tensor or sequence."""
    return values.tolist() if isinstance(values, Tensor) else list(values)


def _csv(*rows: Iterable[Sequence[Cell]]) -> str:
    written = io.StringIO()
    csv.writer(written).writerows(chain(*rows))
    return written.getvalue()


def _named(labels: Sequence[str], index: int) -> Cell:
    return labels[index] if labels else index + 1


def _repeats(**labels: Sequence[str]) -> list[str]:
    return [f"labels of {what} repeat" for what, given in labels.items() if len(set(given)) < len(given)]


def _refuse(title: str, faults: Sequence[str]) -> None:
    if faults:
        raise ValueError(f"the figure {title!r} cannot be drawn: {'; '.join(faults)}")
