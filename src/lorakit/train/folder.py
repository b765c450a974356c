"""The folder of a run: who it belongs to, its metrics and its checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lorakit.core.atomic import write_files
from lorakit.core.parsed import parsed
from lorakit.errors import LorakitError, OutputExists
from lorakit.train import checkpoint, metrics
from lorakit.train.best import Evaluated, evaluated
from lorakit.train.checkpoint import Checkpoint
from lorakit.train.distributed import ALONE, World
from lorakit.train.settings import Step

_log = logging.getLogger(__name__)
TRAINING = "training.json"
CHECKPOINTS = "checkpoints"
_MARKS = (TRAINING, metrics.METRICS, CHECKPOINTS, "adapter_config.json")  # each shows that a run lives here


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where one run keeps `training.json`, `metrics.jsonl` and `checkpoints/`; nothing is written before a step is.

    Of several processes the first reads and writes, but for a part of each checkpoint.
    """

    path: Path
    identity: Mapping[str, Any]  # what has to be the same for the run to be resumed
    world: World = ALONE

    def refuse_other_run(self, *, resume: bool) -> None:
        """Check, before anything is written, that the folder is free or, on resuming, holds this very run.

        Raises:
            OutputExists: it holds another run; on resuming, the message names what differs.
            LorakitError: the processes of this run are not about the same.
        """
        if self.world.is_first:
            self._refuse_other_run(resume=resume)
        first = self.world.told(self.identity)
        if different := [key for key in first if first[key] != self.identity.get(key)]:
            raise LorakitError(f"the processes of this run differ: {different[0]} is {_short(first[different[0]])} in "
                               f"the first and {_short(self.identity.get(different[0]))} in process {self.world.rank}; "
                               "give all of them the same files and settings")  # fmt: skip

    def _refuse_other_run(self, *, resume: bool) -> None:
        present = marks(self.path)
        if present and not resume:
            raise OutputExists(f"{self.path} holds another run (it has {', '.join(present)}); resume that run "
                               "(--resume, or resume=True), or choose another output folder")  # fmt: skip
        there = self._identity_there(present) if resume else self.identity
        different = [key for key in self.identity if there.get(key) != self.identity[key]]
        if different:
            told = [apart(key, there.get(key), self.identity[key]) for key in different]
            raise OutputExists(f"{self.path} holds a run that differs from the one to be resumed: {'; '.join(told)}; "
                               "resume with the same settings, or choose another output folder")  # fmt: skip

    def begin(self) -> Checkpoint | None:
        """The newest checkpoint, if there is one, in the first process; metrics of later steps are cut off."""
        found = checkpoint.newest(self.path / CHECKPOINTS) if self.world.is_first else None
        self.cut_back(found.step if found else 0)
        return found

    def cut_back(self, step: int) -> None:
        """Drop the metrics of later steps."""
        if self.world.is_first:
            metrics.cut_back(self.path, step)

    def evaluations(self) -> list[Evaluated]:
        """The evaluations in the metrics."""
        return self.world.told(evaluated(self.path) if self.world.is_first else [])

    def last(self) -> Step | None:
        """The last step in the metrics."""
        there = self.world.is_first and (self.path / metrics.METRICS).exists()
        rows = metrics.read(self.path) if there else []
        row = self.world.told(rows[-1] if rows else {})
        return Step(**{field.name: row[field.name] for field in fields(Step) if field.name in row}) if row else None

    def record(self, step: Step) -> None:
        """Add a step to the metrics."""
        if self.world.is_first:
            self._claim()
            metrics.append(self.path, step)

    def write(self, state: Checkpoint) -> Path:
        """Write a checkpoint, by all processes."""
        if self.world.size == 1:
            return self.write_alone(state)
        return checkpoint.write_together(self.path / CHECKPOINTS, state, self.world)

    def write_alone(self, state: Checkpoint) -> Path:
        """Write a checkpoint by the first process, where others may be gone."""
        if self.world.is_first:
            self._claim()
            checkpoint.write(self.path / CHECKPOINTS, state)
        return self.path / CHECKPOINTS / checkpoint.file_name(state.step)

    def _claim(self) -> None:
        if not (self.path / TRAINING).exists():
            write_files(self.path, {TRAINING: (json.dumps(self.identity, indent=2) + "\n").encode()})

    def _identity_there(self, present: list[str]) -> Mapping[str, Any]:
        if not present:
            _log.warning("%s holds no run yet: there is nothing to resume, so the run starts", self.path)
            return self.identity
        if TRAINING not in present:
            raise OutputExists(f"{self.path} has {', '.join(present)} but no {TRAINING}, so it holds no run that can "
                               "be resumed; choose another output folder")  # fmt: skip
        path = self.path / TRAINING
        return parsed(path.read_bytes(), path, "choose another output folder")


def marks(folder: Path) -> list[str]:
    """What there is in a folder that shows that a run lives there."""
    return [mark for mark in _MARKS if (folder / mark).exists()]


def apart(name: str, there: object, here: object) -> str:
    """In what two runs differ.

    >>> apart("seed", 0, 1)
    'seed is 0 there and 1 here'
    """
    return f"{name} is {_short(there)} there and {_short(here)} here"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
