"""Show what adapters learned, as one HTML page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress, SpinnerColumn, TextColumn

from lorakit.analyse import html
from lorakit.analyse.report import report
from lorakit.cli._adapter import data_of
from lorakit.cli._declare import OVERRIDES
from lorakit.cli._show import console, say, size
from lorakit.data import Data, Dataset, open_data
from lorakit.errors import LorakitError
from lorakit.reproduce.run import RUN
from lorakit.reproduce.study import Asked, gather


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which adapters, with what to compare them, and where to write."""

    adapters: tuple[str, ...] = field(metadata={"positional": True})  # in any format, or folders of changed models
    out: str = "report.html"  # the page
    base: str | None = None  # their base, for what compares an update with its weight; None: leave that out
    examples: int = 8  # test examples on which base and adapters are compared, with --base; 0: none
    data: dict[str, Any] = field(default_factory=dict, metadata={OVERRIDES: Data})  # else what the first was trained on
    alpha: float | None = None  # the updates are scaled by alpha / rank, where a file does not say
    rank: int = 64  # directions kept of each matrix of a changed model


def main(options: Options) -> None:
    """Gather, analyse, write."""
    html.check(options.out)
    data = _data(options)
    asked = Asked(
        adapters=options.adapters,
        base=options.base,
        alpha=options.alpha,
        rank=options.rank,
        examples=() if data is None else data.test[: options.examples],
    )
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True) as progress:
        task = progress.add_task("reading")

        def watch(what: str) -> None:
            progress.update(task, description=what)

        html.write(report(gather(asked, watch=watch), watch=watch), options.out)
    say(f"{options.out} holds the report ({size(Path(options.out).stat().st_size)}); open it in a browser")


def _data(options: Options) -> Dataset | None:
    """What base and adapters are compared on; None where that is not asked, or no data are known."""
    if options.examples < 0:
        raise LorakitError(f"--examples {options.examples} cannot be read; give 0 or more")
    first = Path(options.adapters[0])
    if options.base is None or not options.examples:
        return None
    if options.data or (first / RUN).is_file():
        return open_data(data_of(first, options.data))
    say(f"{first} has no {RUN} that names its data, so nothing is compared on text; name texts with --data")
    return None
