"""A routing: which adapters act on which rows, as explicit data."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from urllib.parse import quote

import torch
from torch import Tensor, nn

RESERVED = ("training", "state", "acted", "versions")


@dataclass(frozen=True)
class Inserted:
    """What a method put into the sequence of one forward; two with the same key are the same.

    `index_BL` numbers the places put in (-1: a token that was given), `kept_BT` says for each token given which place's
    hidden state it gets.
    """

    key: tuple[object, ...]
    index_BL: Tensor = field(compare=False, repr=False)
    kept_BT: Tensor = field(compare=False, repr=False)


@dataclass(frozen=True)
class Routing:
    """One adapter for the whole batch (`names` alone), a weighted mixture, or one adapter a row.

    `rows` numbers the entry of `names` for each row, -1 for the base. What a forward reads are the tensors made of
    these once: Python values in a forward would be compiled in.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    rows: tuple[int, ...] | None = None
    inserted: Inserted | None = None
    keys: tuple[str, ...] = field(default=(), compare=False, repr=False)  # the names as module names
    weights_N: Tensor | None = field(init=False, compare=False, repr=False)
    rows_B: Tensor | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        made = {
            "keys": self.keys or tuple(key_of(name) for name in self.names),  # a compiled forward cannot make them
            "weights_N": None if self.weights is None else torch.tensor(self.weights),
            "rows_B": None if self.rows is None else torch.tensor(self.rows),
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @property
    def used(self) -> tuple[str, ...]:
        """The names that act on something."""
        return self.names if self.rows is None else tuple(self.names[number] for number in sorted({*self.rows} - {-1}))

    def among(self, names: tuple[str, ...]) -> Routing | None:
        """The same routing where only these names are attached; None if one that is used is gone."""
        if not set(self.used) <= set(names):
            return None
        if self.rows is None:
            return self
        kept = tuple(name for name in self.names if name in names)  # others may not be able to share a batch
        return Routing(kept, rows=tuple(-1 if n < 0 else kept.index(self.names[n]) for n in self.rows))


def mark_of(routing: Routing | None) -> Tensor:
    """An empty tensor whose shape tells this routing from others.

    Saved for backward, it makes a checkpoint notice when it recomputes a forward under another routing.
    """
    return torch.empty(0 if routing is None else 1 + zlib.crc32(repr(routing).encode()), 0)


def key_of(name: str) -> str:
    """Encode any adapter name as a module name (no dots, no clash with a method of `nn.Module`).

    >>> key_of("reviews"), key_of("v1.2"), key_of("train")
    ('reviews', 'v1%2E2', 'train%')
    """
    key = quote(name, safe=" ").replace(".", "%2E")
    return f"{key}%" if key in RESERVED or key in dir(nn.Module) else key
