"""What an adapter folder tells of itself: its base and its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorakit import models
from lorakit.core import files
from lorakit.core.files import load
from lorakit.errors import LorakitError


def base_of(adapter: Path, base: str | None) -> str:
    """The base that was named, or the one that the adapter's file names.

    Raises:
        LorakitError: neither does.
    """
    config, _, _ = files.read(adapter)
    found = base or config.get("base_model_name_or_path")
    if not found:
        raise LorakitError(f"{adapter} does not say which base it belongs to; name it with --base")
    return str(found)


def loaded(adapter: Path, base: str | None) -> tuple[Any, Any, str]:
    """The base, its tokenizer, and the name under which the adapter is attached to it."""
    _, header, _ = files.read(adapter)
    labels = (header or {}).get("base", {}).get("labels") or None
    model, tokenizer = models.load(base_of(adapter, base), labels=labels)
    return model, tokenizer, load(model, adapter)


def recorded(adapter: Path, key: str) -> dict[str, Any]:
    """An entry of the run that made the adapter, or nothing where there is no record."""
    path = adapter / "run.json"
    return dict(json.loads(path.read_text())["run"].get(key, {})) if path.is_file() else {}
