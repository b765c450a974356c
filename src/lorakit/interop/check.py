"""What another program will refuse of an adapter, or silently get wrong, and what mends it.

Each program is one file in `consumers/`, found by its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

from lorakit.core import registry
from lorakit.core.exchange import Exchange
from lorakit.core.files import PICKLE, TENSORS
from lorakit.core.pickles import read_pickle
from lorakit.interop.format import Told
from lorakit.interop.shards import entries

Grade = Literal["refuses", "wrong", "ignores", "fine"]
PACKAGE = "lorakit.interop.consumers"


@dataclass(frozen=True)
class Finding:
    """One thing that a program does with an adapter."""

    grade: Grade  # refuses to load; computes something else; leaves out what may matter; a remark
    what: str
    mend: str = ""  # a command, where one mends it


@dataclass(frozen=True)
class Seen:
    """An adapter as another program meets it."""

    exchange: Exchange
    path: Path
    keys: tuple[str, ...] = ()  # the tensors' names as they stand in the file of a PEFT folder
    alpha: float | None = None  # what the caller told, as the file does not say it

    @property
    def place(self) -> str:
        """Its path, to append to: without a file's ending, and never only a dot."""
        path = self.path if self.path.name else self.path.resolve()
        return str(path.with_suffix("") if path.is_file() else path)


def check(exchange: Exchange, path: Path, consumer: str, told: Told | None = None) -> list[Finding]:
    """What `consumer` does with the adapter at `path`, the worst first.

    Args:
        exchange: what the file at `path` holds.
        path: where it is, for names in the file, neighbours, and the commands that mend.
        consumer: a file's name in `interop/consumers`; a dot counts as an underscore (llama.cpp).
        told: what `exchange` was read with.

    Raises:
        UnknownName: no such program is known; the message gives those that are.

    Example:
        >>> from lorakit.core.exchange import Exchange
        >>> [found.grade for found in check(Exchange("peft", ()), Path("reviews"), "vllm")]
        ['refuses']
    """
    seen = Seen(exchange, path, _keys(path), told.alpha if told else None)
    order = {grade: number for number, grade in enumerate(get_args(Grade))}
    return sorted(program(consumer).findings(seen), key=lambda found: order[found.grade])


def _keys(folder: Path) -> tuple[str, ...]:
    if (folder / TENSORS).is_file():
        return tuple(entries(folder / TENSORS))
    return tuple(read_pickle(folder / PICKLE)) if (folder / PICKLE).is_file() else ()


def program(consumer: str) -> ModuleType:
    """The file of a program: its TITLE says which version was read.

    Raises:
        UnknownName: no such program is known; the message gives those that are.
    """
    return registry.find(PACKAGE, consumer.lower().replace(".", "_"))


def is_usable(found: Iterable[Finding]) -> bool:
    """Whether a program loads the adapter and computes with it what was trained."""
    return all(each.grade in ("ignores", "fine") for each in found)
