"""Tables and sentences for people."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorakit.core.summary import size

console = Console(markup=False, emoji=False, highlight=False)  # a model's text is shown as it is
_ENDLESS = 1_000_000  # columns, more than any table has


def say(text: str | Text = "") -> None:
    """Print prose or a command; only a terminal breaks its lines, so that it can be copied whole."""
    console.print(text, soft_wrap=True)


def program() -> str:
    """How to call lorakit from here: by its name where the shell finds it, otherwise as it was called."""
    called = Path(sys.argv[0])
    found = shutil.which("lorakit") or called.name != "lorakit"
    return "lorakit" if found else shlex.quote(os.path.relpath(called))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, texts: int = 1) -> None:
    """Print a table; the first `texts` columns are left-aligned, the others right-aligned.

    Only a terminal folds what is too wide for it, so that a path in a file or a pipe is found whole.
    """
    if title:
        say(Text(f"\n{title}", style="bold"))
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(columns))
    for number, column in enumerate(columns):
        shown.add_column(column, justify="left" if number < texts else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(value if isinstance(value, str) else number_of(value) for value in row))
    if not console.is_terminal:
        shown.width = console.measure(shown, options=console.options.update(max_width=_ENDLESS)).maximum
    console.print(shown, crop=False)


def sides(title: str, found: Mapping[str, Mapping[str, float]]) -> None:
    """Print the measures of several sides beside each other."""
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    table(title, ["measure", *found], [[name, *(values.get(name, "") for values in found.values())] for name in names])


def number_of(value: Any) -> str:
    """A number as people write it.

    >>> number_of(0.84375), number_of(460800), number_of(None)
    ('0.844', '460,800', '')
    """
    if value is None:
        return ""
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"


__all__ = ["console", "number_of", "program", "say", "sides", "size", "table"]
