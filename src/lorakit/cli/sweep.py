"""Train many adapters that differ in some values, several at once on one base, and compare them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from lorakit.cli import _declare
from lorakit.cli._show import console, program, say, table
from lorakit.core.method import Method
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
    common = [word for field in fields(Run) for word in _words(field, getattr(sweep, field.name))]

    def declare(values: Values) -> Run:
        run: Run = _declare.parse(
            Run, "sweep", "", [*common, *(_word(f"--{key}", value) for key, value in values.items())]
        )
        return run

    found = carry_out(sweep, declare, resume=options.resume, wrap=_shown)
    _tell(found, sweep)


def _words(field: Any, value: Any, prefix: str = "--") -> Iterator[str]:
    """A field's value as flags, where it is not the default; the parts of a part each by itself."""
    path, default = f"{prefix}{field.name}", field.default
    if is_dataclass(value):
        told = value.to_json() if isinstance(value, Method) else vars(value)
        if isinstance(value, Method):
            yield _word(f"{path}.{_declare.METHOD}", value.name)
        for each in fields(value):
            yield from _words(each, told[each.name], f"{path}.")
    elif value != (default if field.default_factory is MISSING else field.default_factory()):
        yield _word(path, value)


def _word(path: str, value: Any) -> str:
    """A flag with its value, as in a TOML file."""
    return f"{path}={value if isinstance(value, str) else json.dumps(value)}"


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
