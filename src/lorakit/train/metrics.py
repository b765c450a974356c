"""`metrics.jsonl`: one line a step, on disk as soon as the step is done."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorakit.core.atomic import write_files
from lorakit.core.parsed import parsed
from lorakit.errors import LorakitError
from lorakit.train.settings import Step

METRICS = "metrics.jsonl"
_SMOOTHING = 0.8


def append(folder: Path, step: Step) -> None:
    """Add one step's line; on a full disk the file is cut back to the lines before it.

    Raises:
        LorakitError: the line could not be written.
    """
    path = folder / METRICS
    line = json.dumps({**asdict(step), "tokens_per_second": step.tokens_per_second}) + "\n"
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(line)
    except OSError as error:
        if path.is_file():
            os.truncate(path, size)
        raise LorakitError(f"{path} could not be written ({error.strerror}): step {step.step} is not in it; make room "
                           "and resume") from error  # fmt: skip


def cut_back(folder: Path, step: int) -> None:
    """Keep the lines up to `step`, and drop what came after it and a last line that was not written whole."""
    path = folder / METRICS
    if path.exists():
        kept = [json.dumps(row) + "\n" for row in read(folder) if row["step"] <= step]
        write_files(folder, {METRICS: "".join(kept).encode()})


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run as dictionaries; a last line that was not written whole is left out.

    Raises:
        LorakitError: another line is damaged.
    """
    path = folder / METRICS
    lines = path.read_text(errors="replace").split("\n")[:-1]
    advice = "remove that line, and the run goes on without it"
    return [parsed(line, f"{path}, line {number},", advice) for number, line in enumerate(lines, 1)]


def smoothed(values: Iterable[float]) -> Iterator[float]:
    """The average over about the last five values, without a bias towards 0 at the start.

    >>> [round(value, 2) for value in smoothed([2.0, 2.0, 1.0])]
    [2.0, 2.0, 1.59]
    """
    average = weight = 0.0
    for value in values:
        average = _SMOOTHING * average + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + 1 - _SMOOTHING
        yield average / weight
