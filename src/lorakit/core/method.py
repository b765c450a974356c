"""A method: which sites, how big, and with what maths. It *is* the configuration of an adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from lorakit.core import registry
from lorakit.core.delta import Delta
from lorakit.core.plan import BIAS, MODULE, Placement, Plan
from lorakit.core.replace import ReplacedBias, ReplacedModule
from lorakit.errors import UnknownName, nearest

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A frozen, comparable, JSON-able description of an adapter.

    A new method is one file in `methods/`: a dataclass with these verbs, and a `Delta`.
    """

    name: ClassVar[str]
    peft_type: ClassVar[str]

    @abstractmethod
    def plan(self, model: nn.Module) -> Plan:
        """Resolve the method against a model: one placement a delta.

        Raises:
            NoSuchTarget: a target that matches nothing.
            BadMethod: a size that the model cannot hold.
        """

    @abstractmethod
    def build(self, placement: Placement, module: nn.Module) -> Delta:
        """Make the delta of one placement of the plan, freshly initialised, on the CPU."""

    @abstractmethod
    def check(self, plan: Plan, model: nn.Module) -> None:
        """Refuse sizes that make no sense in a fresh adapter (a loaded one may have been given them)."""

    @abstractmethod
    def to_peft(self, deltas: Sequence[Delta]) -> tuple[dict[str, Any], Tensors]:
        """The fields of PEFT's config that describe these deltas, and their tensors by PEFT's names."""

    @classmethod
    @abstractmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Tensors, model: nn.Module) -> tuple[Self, Plan]:
        """Read the method and its plan from a PEFT config and the tensors beside it (names without PEFT's prefix)."""

    @abstractmethod
    def read(self, deltas: Sequence[Delta], tensors: Tensors) -> list[str]:
        """Copy tensors (by PEFT's names) into the deltas, taking them out of `tensors`; return every fault."""

    def to_json(self) -> dict[str, Any]:
        """The method's name and fields as plain JSON values."""
        return {"name": self.name} | asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Method:
        """Read a method written by `to_json`; unknown fields are an error."""
        values = dict(data)
        kind = method_called(str(values.pop("name", "")))
        unknown = sorted(set(values) - {field.name for field in fields(kind)})
        if unknown:
            have = [field.name for field in fields(kind)]
            raise UnknownName(f"{kind.name} has no field {unknown[0]!r}; {nearest(unknown[0], have)}")
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def method_called(name: str) -> type[Method]:
    """The method class of the file `name` in `methods/`.

    >>> method_called("lora").__name__
    'LoRA'
    """
    module = registry.find("lorakit.methods", name)
    return next(
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Method) and kind.__module__ == module.__name__
    )


def method_of_peft(peft_type: str) -> type[Method]:
    """The method class that reads PEFT folders of this `peft_type`."""
    kinds = [method_called(name) for name in registry.names("lorakit.methods")]
    have = {kind.peft_type: kind for kind in kinds}
    if peft_type not in have:
        raise UnknownName(f"lorakit has no method for PEFT's type {peft_type!r}; {nearest(peft_type, have)}")
    return have[peft_type]


def build(method: Method, placement: Placement, module: nn.Module) -> Delta:
    """Make one delta of a plan, on its module's device and in its training mode."""
    if placement.kind == BIAS:
        delta: Delta = ReplacedBias(placement, module)
    elif placement.kind == MODULE:
        delta = ReplacedModule(placement, module)
    else:
        delta = method.build(placement, module)
    own = next(module.parameters(recurse=False), None)
    return delta.to(device=None if own is None else own.device).train(module.training)
