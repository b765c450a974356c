"""The plan: what a method becomes on one model, as an explicit list that is printed, saved and used for loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from typing import Any

from lorakit.core.sites import Slice, slice_of

LOW_RANK, BIAS, MODULE = "low-rank", "bias", "module"


@dataclass(frozen=True)
class Placement:
    """One delta to build: where it acts, what it is, and how big.

    `kind` names the delta (`low-rank`, or a replaced `bias` or `module`); rank, scale and init are those of low-rank
    deltas and 0, 1.0 and "" otherwise.
    """

    path: str
    role: str
    kind: str
    slice: Slice | None = None
    rank: int = 0
    alpha: float = 0.0
    scale: float = 1.0
    init: str = ""
    dtype: str = "float32"

    @property
    def slot(self) -> str:
        """The delta's name within its module: attribute-safe, unique there."""
        return (self.role if self.kind == LOW_RANK else self.kind).replace(".", "_")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `from_json` gives an equal placement back."""
        return asdict(self) | {"slice": astuple(self.slice) if self.slice else None}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Placement:
        """Read a placement written by `to_json`."""
        return Placement(**{**data, "slice": slice_of(data["slice"])})


Plan = tuple[Placement, ...]
