"""What an adapter folder tells of itself: its base and its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open

from lorakit import models
from lorakit.core import files
from lorakit.core.files import load
from lorakit.data import Data
from lorakit.errors import LorakitError
from lorakit.reproduce.run import RUN, Dtype, Run, at_hand, dtype_of


def base_of(adapter: Path, base: str | None) -> str:
    """The base that was named, or the one that the adapter's file names.

    Raises:
        LorakitError: neither does.
    """
    found = base or _described(adapter)[0].get("base_model_name_or_path")
    if not found:
        raise LorakitError(f"{adapter} does not say which base it belongs to; name it with --base")
    return str(found)


def loaded(adapter: Path, base: str | None) -> tuple[Any, Any, str]:
    """The base, its tokenizer, and the name under which the adapter is attached to it."""
    labels = _described(adapter)[1].get("base", {}).get("labels") or None
    dtype, kept = dtype_of(_recorded(adapter, "dtype", Dtype)), _recorded(adapter, "quantise", models.Quantise)
    model, tokenizer = models.load(base_of(adapter, base), labels=labels, dtype=dtype, quantise=kept)
    return at_hand(model), tokenizer, load(model, adapter)


def _recorded(adapter: Path, name: str, known: Any) -> Any:
    """How the base was loaded in training: a field of `Run`, its default where the record says nothing known."""
    try:
        told = json.loads((adapter / RUN).read_bytes())["run"][name]
    except (OSError, ValueError, KeyError, TypeError):
        told = None
    return told if told in get_args(known) else getattr(Run, name)


def _described(adapter: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """PEFT's config and our header, without the tensors."""
    try:
        with safe_open(adapter / files.TENSORS, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("lorakit", "{}"))
        config = adapter / files.CONFIG
        return json.loads(config.read_bytes()) if config.is_file() else {}, header
    except (SafetensorError, ValueError, OSError):
        config_read, header_read, _ = files.read(adapter)  # which says what is wrong
        return config_read, header_read or {}


def data_of(adapter: Path, given: dict[str, Any]) -> Data:
    """The data that the adapter was trained on, with the given values in place of those recorded.

    Raises:
        LorakitError: nothing says which data, or the record is damaged.
    """
    path = adapter / RUN
    try:
        told = json.loads(path.read_bytes())["run"]["data"] if path.is_file() else {}
        told = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()} | given
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LorakitError(f"{path} is damaged ({error!r}); remove it, and name the data with --data") from error
    if "source" not in told:
        raise LorakitError(f"{adapter} has no {RUN} that names its data; give --data")
    try:
        return Data(**told)
    except TypeError as error:
        raise LorakitError(f"{path} is damaged: {error}; remove it, and name the data with --data") from error
