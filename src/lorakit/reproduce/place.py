"""The folder of a run: whether it can be one, what it was told, and what its files add up to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit.core.files import TENSORS
from lorakit.core.summary import summary
from lorakit.errors import OutputExists
from lorakit.train.folder import RunFolder
from lorakit.train.metrics import read as read_metrics


def refuse_place(out: str, *, resume: bool = False) -> None:
    """Refuse, before anything is loaded, a folder that the run could not write.

    Raises:
        OutputExists: it holds another run, or cannot be a folder, or cannot be written.
    """
    folder = Path(out).absolute()
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not folder.resolve().name:
        why = "the adapter bears the folder's name, and this one has none"
    elif not there.is_dir():
        why = f"{there} is no folder"
    else:
        why = "" if os.access(there, os.W_OK | os.X_OK) else f"{there} may not be written"
    if why:
        raise OutputExists(f"--out {out} cannot hold a run: {why}; choose another folder")
    if not resume:
        RunFolder(Path(out), {}).refuse_other_run(resume=False)


def differing(told: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of what is told, and not so now.

    >>> list(differing({"keep": "best", "train": {"steps": 3}}, {"keep": "last", "train": {"steps": 3, "new": 0}}))
    ['keep']
    """
    for key, value in told.items():
        if isinstance(value, dict) and isinstance(now.get(key), dict):
            yield from differing(value, now[key], f"{prefix}{key}.")
        elif value != now.get(key):
            yield f"{prefix}{key}"


def figures(model: Any, name: str, out: Path) -> dict[str, Any]:
    """What the run cost, all its steps together: parameters, bytes, seconds and tokens."""
    told, steps = summary(model), read_metrics(out)
    seconds, tokens, computed = (sum(step[key] for step in steps) for key in ("seconds", "tokens", "computed"))
    return {
        "train_seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "tokens": tokens,
        "computed": computed,
        "steps": steps[-1]["step"],
        "loss": steps[-1]["loss"],
        "trainable_parameters": next(a.trainable for a in told.adapters if a.name == name),
        "adapter_bytes": (out / TENSORS).stat().st_size,
        "model_bytes": told.base_bytes,
    }
