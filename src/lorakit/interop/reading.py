"""Any adapter's file or folder, read by the format that recognises it, and written in another."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lorakit.core import registry
from lorakit.core.exchange import Exchange
from lorakit.core.patterns import residual
from lorakit.core.pickles import SUFFIXES, read_pickle
from lorakit.errors import BadAdapterFile, OutputExists
from lorakit.interop.checkpoint import copied
from lorakit.interop.format import Told

FORMATS = "lorakit.interop.formats"


def format_of(path: Path) -> ModuleType:
    """The format of a file or folder.

    Raises:
        BadAdapterFile: there is nothing, or nothing that a format recognises, or more than one does.
    """
    if not os.path.exists(path):  # which is False of a name that is too long, too
        raise BadAdapterFile(path, ["there is no such file or folder"])
    known = [registry.find(FORMATS, name) for name in registry.names(FORMATS)]
    found = [module for module in known if module.recognises(path)]
    if len(found) == 1:
        return found[0]
    if not found and path.suffix in SUFFIXES:
        read_pickle(path)  # which says what it holds besides tensors
    titles = ", ".join(module.TITLE for module in (found or known))
    reason = f"it is several formats at once: {titles}" if found else f"it is in none of the formats known: {titles}"
    inner = [each.name for each in (sorted(path.iterdir()) if path.is_dir() else ()) if not each.name.startswith(".")]
    within = [name for name in inner if any(module.recognises(path / name) for module in known)]
    more = f"; adapters lie in it: {', '.join(within[:3])}{' …' * (len(within) > 3)}" if within and not found else ""
    raise BadAdapterFile(path, [reason + more])


def read(path: str | Path, told: Told | None = None) -> Exchange:
    """What an adapter's file or folder holds, in whatever format; tensors are read when they are wanted.

    Args:
        path: a PEFT folder, a GGUF adapter, a loralib checkpoint, a kohya or diffusers file.
        told: what the file may not say (loralib: alpha).

    Raises:
        BadAdapterFile: an unknown, mixed or damaged format; every fault is listed.
    """
    found: Any = format_of(Path(path))
    return found.read(Path(path), told or Told())


def convert(source: str | Path, out: str | Path, to: str, told: Told | None = None) -> list[str]:
    """Write an adapter in another format.

    Returns:
        What a user should know: how exact folded numbers are, what was left out.

    Raises:
        OutputExists: `out` is there already.
        UnknownName: no such format.
        BadAdapterFile: it cannot be read, or the format cannot express it, and why.
    """
    refuse_existing(Path(out))
    registry.find(FORMATS, to)
    exchange = read(source, told)
    notes: list[str] = []
    if told and told.base and exchange.whole and to != exchange.format:
        exchange, notes = _without_copies(exchange, told.base)
    return notes + write(exchange, out, to, told)


def _without_copies(exchange: Exchange, base: str) -> tuple[Exchange, list[str]]:
    """The adapter without the base's own tensors, which PEFT writes beside the updates of embeddings."""
    from lorakit.models import folder

    own = copied(exchange.whole, folder(base))
    kept = {name: value for name, value in exchange.whole.items() if name not in own}
    return replace(exchange, whole=kept), [f"left out, as the base has the same: {', '.join(own)}"] if own else []


def write(exchange: Exchange, out: str | Path, to: str, told: Told | None = None) -> list[str]:
    """Write what was read, or made, in a format; as `convert` otherwise."""
    refuse_existing(Path(out))
    writer: Any = registry.find(FORMATS, to)
    if faults := residual(exchange.config):
        raise BadAdapterFile("the adapter", faults)
    return writer.write(exchange, Path(out), told or Told())


def refuse_existing(out: Path) -> None:
    """Refuse a place where something is.

    Raises:
        OutputExists: there is.
    """
    if out.exists():
        raise OutputExists(f"{out} exists already; name a new place for the adapter")
