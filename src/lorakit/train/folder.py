"""The folder of a run: who it belongs to, its metrics and its checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.core.atomic import write_files
from lorakit.errors import OutputExists
from lorakit.train import checkpoint, metrics
from lorakit.train.checkpoint import Checkpoint
from lorakit.train.settings import Step

_log = logging.getLogger(__name__)
TRAINING = "training.json"
CHECKPOINTS = "checkpoints"
_MARKS = (TRAINING, metrics.METRICS, CHECKPOINTS, "adapter_config.json")  # each shows that a run lives here


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where one run keeps `training.json`, `metrics.jsonl` and `checkpoints/`; nothing is written before a step is."""

    path: Path
    identity: Mapping[str, Any]  # what has to be the same for the run to be resumed

    def refuse_other_run(self, *, resume: bool) -> None:
        """Check, before anything is written, that the folder is free or, on resuming, holds this very run.

        Raises:
            OutputExists: it holds another run; on resuming, the message names what differs.
        """
        present = [mark for mark in _MARKS if (self.path / mark).exists()]
        if present and not resume:
            raise OutputExists(f"{self.path} holds another run (it has {', '.join(present)}); resume that run "
                               "(--resume, or resume=True), or choose another output folder")  # fmt: skip
        there = self._identity_there(present) if resume else self.identity
        different = [key for key in self.identity if there.get(key) != self.identity[key]]
        if different:
            told = [
                f"{key} is {_short(there.get(key))} there and {_short(self.identity[key])} here" for key in different
            ]
            raise OutputExists(f"{self.path} holds a run that differs from the one to be resumed: {'; '.join(told)}; "
                               "resume with the same settings, or choose another output folder")  # fmt: skip

    def begin(self) -> Checkpoint | None:
        """The newest checkpoint, if there is one; metrics of later steps are cut off."""
        found = checkpoint.newest(self.path / CHECKPOINTS)
        metrics.cut_back(self.path, found.step if found else 0)
        return found

    def record(self, step: Step) -> None:
        """Add a step to the metrics."""
        self._claim()
        metrics.append(self.path, step)

    def write(self, state: Checkpoint) -> Path:
        """Write a checkpoint."""
        self._claim()
        return checkpoint.write(self.path / CHECKPOINTS, state)

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
        return dict(json.loads((self.path / TRAINING).read_text()))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
