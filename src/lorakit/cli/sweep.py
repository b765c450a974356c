"""Train many adapters that differ in some values, several at once on one base, and compare them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lorakit.cli import _declare
from lorakit.cli._show import console, program, say, table
from lorakit.errors import LorakitError
from lorakit.reproduce.run import Run
from lorakit.reproduce.sweep import SWEEP, Sweep, Table, Turns, Values, carry_out, shortened


@dataclass(frozen=True, kw_only=True)
class Options(Sweep):
    """A sweep, and whether it goes on from where one stopped."""

    resume: bool = False  # leave finished runs as they are, and go on with the others


def main(options: Options) -> None:
    """Carry out all runs and print them, best first.

    Raises:
        LorakitError: some runs failed; all others came to their end.
    """
    sweep = Sweep(**{field.name: getattr(options, field.name) for field in fields(Sweep)})
    common = _declare.words_of(Run, {field.name: getattr(sweep, field.name) for field in fields(Run)})

    def declare(values: Values) -> Run:
        run: Run = _declare.parse(
            Run, "sweep", "", [*common, *(_declare.word(f"--{key}", value) for key, value in values.items())]
        )
        return run

    found = carry_out(sweep, declare, resume=options.resume, wrap=_shown)
    _tell(found, sweep)


def _shown(turns: Turns) -> Turns:
    """A line where a run ends; on a terminal a bar for each that goes on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    tasks: dict[str, Any] = {}
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:
        for name, step in turns:
            loss = f"loss {step.loss:.4f}"
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=step.steps, loss=loss)
            bars.update(tasks[name], completed=step.step, loss=loss, visible=step.step < step.steps)
            if step.step == step.steps:
                say(f"{name}: {step.steps} steps, {loss}")
            yield name, step


def _tell(found: Table, sweep: Sweep) -> None:
    keys = dict.fromkeys(key for row in found.rows for key in row.values)
    ended = [row for row in found.rows if row.results is not None]
    measures = dict.fromkeys(key for row in ended for key in (row.results or {}).get("adapter", {}))
    numbers = list(dict.fromkeys([found.by, *measures, "loss", "train_seconds"]))
    rows = [[*(str(row.values[key]) for key in keys), *(row.number(by) for by in numbers)] for row in ended]
    title = f"{sweep.base}: {len(ended)} of {len(found.rows)} runs, by {found.by}"
    table(title, [*shortened(keys).values(), *numbers], rows, texts=len(keys))
    say(f"{sweep.out} holds {SWEEP} and a folder for each run.")
    if ended:
        say(f"The first of them: {program()} inspect {shlex.quote(str(Path(sweep.out) / ended[0].name))}")
    failed = [f"{row.name}: {row.error}" for row in found.rows if row.error]
    for line in failed:
        say(f"  {line}")
    if failed:
        raise LorakitError(f"{len(failed)} of {len(found.rows)} runs failed, as said above and in {SWEEP}; the others "
                           "are done, and --resume tries these again")  # fmt: skip
