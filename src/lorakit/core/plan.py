"""The plan: what a method becomes on one model, as an explicit list that is printed, saved and used for loading."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Final

from torch import nn

from lorakit.core.checked import misfits, types_of
from lorakit.core.experts import WEIGHT, shape_of
from lorakit.core.sites import Slice, modules_of, slice_of

BIAS: Final = "bias"
MODULE: Final = "module"
REPLACED: Final = (BIAS, MODULE)  # kinds of the core's own; every other is a method's
_ONCE = {"dtype": str}  # entries of older files that say nothing any more


@dataclass(frozen=True)
class Placement:
    """One delta to build: where it acts, what it is, and how big.

    `kind` names the delta: a replaced `bias` or `module`, or a word of the method's own (`low-rank`). `rank` is its
    size (the rank of a factorisation, the width of a bottleneck, the number of prefix tokens), 0 where it has none;
    alpha, scale and init are those of low-rank deltas. `part` numbers the method of a combination. `parameter` is the
    module's weight, or its parameter in which experts are stacked.
    """

    path: str
    role: str
    kind: str
    slice: Slice | None = None
    rank: int = 0
    alpha: float = 0.0
    scale: float = 1.0
    init: str = ""
    part: int = 0
    parameter: str = WEIGHT

    @property
    def is_replaced(self) -> bool:
        """Whether the delta is the core's own: a value trained in place of the base's."""
        return self.kind in REPLACED

    @property
    def slot(self) -> str:
        """The delta's name within its module: attribute-safe, unique there."""
        name = (self.kind if self.is_replaced else self.role).replace(".", "_")
        return f"{name}_{self.part}" if self.part else name

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `from_json` gives an equal placement back."""
        values = asdict(self) | {"slice": astuple(self.slice) if self.slice else None}
        usual = {"part": 0, "parameter": WEIGHT}
        return {key: value for key, value in values.items() if key not in usual or value != usual[key]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Placement:
        """Read a placement written by `to_json`."""
        values = {key: value for key, value in data.items() if key not in _ONCE}
        return Placement(**{**values, "slice": slice_of(values.get("slice"))})


Plan = tuple[Placement, ...]


def plan_faults(told: Sequence[object], kinds: Mapping[int, Collection[str]] | None) -> list[str]:
    """What is wrong with a plan that a file tells, whatever the model; one without faults can be read.

    `kinds` are those that each part of the method has (None: not known).
    """
    faults: list[str] = []
    seen: set[tuple[str, str]] = set()
    wanted = types_of(Placement) | _ONCE
    for number, entry in enumerate(told, 1):
        what = f"entry {number} of its plan"
        bad = misfits(entry, wanted, what, required=("path", "role", "kind"), closed=True)
        if isinstance(entry, Mapping) and not bad:
            placement = Placement.from_json(entry)
            bad = [f"{what} {words}" for words in _senseless(placement, kinds, seen)]
            seen.add((placement.path, placement.slot))
        faults += bad
    return faults


def _senseless(
    placement: Placement, kinds: Mapping[int, Collection[str]] | None, seen: set[tuple[str, str]]
) -> Iterator[str]:
    own = kinds.get(placement.part, ()) if kinds is not None else (placement.kind,)
    if placement.kind not in (*REPLACED, *own):
        yield f"has a bad kind: {placement.kind!r}"
    if placement.rank < 0 or placement.part < 0:
        yield f"has the rank {placement.rank} and the part {placement.part}"
    if placement.is_replaced and placement.slice is not None:
        yield f"gives a slice to a {placement.kind}"
    if not placement.slot or hasattr(nn.ModuleDict(), placement.slot):
        yield f"has the role {placement.role!r}, which no place can have"
    if (placement.path, placement.slot) in seen:
        yield f"repeats {placement.role} of {placement.path}"


def misplaced(plan: Plan, model: nn.Module) -> list[str]:
    """What of a plan this model has no place for."""
    modules = dict(modules_of(model))
    return [fault for each in plan if (fault := _misplaced(each, modules.get(each.path)))]


def _misplaced(placement: Placement, module: nn.Module | None) -> str:
    if module is None:
        return f"this model has no layer {placement.path}"
    own = {name for name, value in module._parameters.items() if value is not None}
    if placement.kind == BIAS and "bias" not in own:
        return f"{placement.path} has no bias here"
    if placement.kind == MODULE and not own:
        return f"{placement.path} has no numbers of its own here"
    shape, part = shape_of(module, placement.parameter), placement.slice
    if placement.parameter != WEIGHT and shape is None:
        return f"{placement.path} has no stacked experts {placement.parameter} here"
    if part and not (shape and _is_inside(part, shape[-2])):
        return f"{placement.path} has no slice {astuple(part)} here"
    return ""


def _is_inside(part: Slice, width: int) -> bool:
    inside = 0 <= part.start < part.start + part.size <= part.stride
    return inside and part.count > 0 and part.stride * part.count == width
