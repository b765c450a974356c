"""The progress display: a wrapper around any iterator of steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from lorakit.train.metrics import smoothed
from lorakit.train.settings import Step

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_LINES = 10  # printed in a whole run where nobody watches a bar


def show(steps: Iterator[Step], console: Console | None = None) -> Generator[Step, None, None]:
    """Show loss, learning rate, tokens/s and time left of the steps that pass through.

    A terminal gets a bar, anything else a line every tenth of the run. Ctrl-C here is handed to the run itself, so
    that it writes its checkpoint.

    Example:
        ```python
        for step in show(train.run(model, feed, settings, out="out/reviews")):
            ...
        ```
    """
    from rich.console import Console

    console = console or Console(stderr=True)
    shown = _bar(steps, console) if console.is_terminal else _lines(steps, console)
    try:
        yield from shown
    except KeyboardInterrupt as interrupt:
        if isinstance(steps, Generator):
            steps.throw(interrupt)
        raise


def _bar(steps: Iterator[Step], console: Console) -> Iterator[Step]:
    with _progress(console) as progress:
        task = progress.add_task("", total=None, loss="", rate="", speed="")
        for step, loss, speed in _smoothed(steps):
            progress.update(
                task,
                completed=step.step,
                total=step.steps,
                loss=f"loss {loss:.4f}",
                rate=f"lr {step.learning_rate:.2e}",
                speed=f"{speed:,.0f} tokens/s",
            )
            yield step


def _lines(steps: Iterator[Step], console: Console) -> Iterator[Step]:
    began = time.monotonic()
    first = 0
    for step, loss, speed in _smoothed(steps):
        first = first or step.step
        if step.step % max(1, step.steps // _LINES) == 0 or step.step == step.steps:
            seconds = (time.monotonic() - began) / (step.step - first + 1) * (step.steps - step.step)
            console.print(
                f"step {step.step}/{step.steps}  loss {loss:.4f}  lr {step.learning_rate:.2e}  "
                f"{speed:,.0f} tokens/s  {seconds:.0f} s left",
                highlight=False,
            )
        yield step


def _smoothed(steps: Iterator[Step]) -> Iterator[tuple[Step, float, float]]:
    """Each step with its smoothed loss and the speed of all steps so far."""
    passing, counted = itertools.tee(steps)
    tokens, seconds = 0, 0.0
    for step, loss in zip(passing, smoothed(step.loss for step in counted), strict=True):
        tokens, seconds = tokens + step.tokens, seconds + step.seconds
        yield step, loss, tokens / seconds


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    figures = [TextColumn(f"{{task.fields[{field}]}}") for field in ("loss", "rate", "speed")]
    columns = [BarColumn(), MofNCompleteColumn(), *figures, TimeRemainingColumn(), TextColumn("left")]
    return Progress(*columns, console=console)
