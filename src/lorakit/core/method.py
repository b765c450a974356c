"""A method: which sites, how big, and with what maths. It *is* the configuration of an adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from lorakit.core import registry
from lorakit.core.checked import described, fits, misfits, types_of
from lorakit.core.delta import Delta
from lorakit.core.named import named_tensors, read_named
from lorakit.core.plan import BIAS, MODULE, Placement, Plan
from lorakit.core.replace import ReplacedBias, ReplacedModule, module_placements
from lorakit.core.sites import Site
from lorakit.errors import BadAdapterFile, BadMethod, UnknownName, nearest

Tensors = dict[str, Tensor]
Names = tuple[str, ...] | str  # as a text: separated by commas
Rules = Iterator[tuple[str, object, str, bool]]  # a field, its value, what it must be, whether it is that
METHODS = "lorakit.methods"


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A frozen, comparable, JSON-able description of an adapter.

    A new method is one file in `methods/`: a dataclass with `places` and `build`, and a `Delta`. Its fields are checked
    by their types, which have to be importable at run time. What else it can say: how its deltas start, what they add
    to the loss, what happens around a training step, and how PEFT would write it.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ()  # of its placements
    peft_type: ClassVar[str] = ""  # "" where PEFT has no such method
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # named constructors: a name, and the fields it sets
    waives: ClassVar[Mapping[str, str]] = {}  # laws that it is free of (fresh, merge, rows), and why
    reads_base: ClassVar[bool] = False  # whether its deltas read the base's weight, so that none may act before them
    replaces_weights: ClassVar[bool] = False  # whether its deltas are the module's weights while it runs

    train: Names = ()  # modules trained whole and saved with the adapter, e.g. classifier

    def __post_init__(self) -> None:
        for name, hint in types_of(type(self)).items():
            if hint == Names and fits(getattr(self, name), Names):
                object.__setattr__(self, name, split(getattr(self, name)))
        self._refuse(self._types())
        self._refuse(self._rules())

    def _refuse(self, rules: Rules) -> None:
        if faults := [f"{name}={value!r} must be {wanted}" for name, value, wanted, kept in rules if not kept]:
            raise BadMethod(f"{type(self).__name__} cannot be built so: {'; '.join(faults)}")

    def _types(self) -> Rules:
        for name, hint in types_of(type(self)).items():
            value = getattr(self, name)
            yield name, value, described(hint), fits(value, hint)

    def _rules(self) -> Rules:
        """What its fields must be besides of their types."""
        yield from ()

    @abstractmethod
    def places(self, model: nn.Module, statistics: Mapping[Any, Any] | None) -> Sequence[Placement]:
        """The method's own placements on a model, and those of biases.

        Raises:
            NoSuchTarget: a target that matches nothing.
            BadMethod: something that the model cannot hold.
        """

    @abstractmethod
    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> Delta:
        """Make the delta of one placement, with room for its numbers; `start` gives them their first values."""

    def plan(self, model: nn.Module, statistics: Mapping[Any, Any] | None = None) -> Plan:
        """Resolve the method against a model: its own placements, then the modules of `train`."""
        own, whole = self.places(model, statistics), module_placements(model, self.train)
        paths = {placement.path for placement in whole}
        both = {placement.path for placement in own if not placement.is_replaced} & paths
        if both:
            raise BadMethod(f"{min(both)} is adapted and trained whole at once; take it out of targets or train")
        return (*(placement for placement in own if placement.path not in paths), *whole)

    def check(self, plan: Plan, model: nn.Module) -> None:
        """Refuse sizes that make no sense in a fresh adapter (a loaded one may have been given them)."""
        del plan, model

    def shared(self, plan: Plan, model: nn.Module) -> nn.Module | None:
        """What all deltas of one adapter have in common; each of them holds it."""
        del plan, model
        return None

    def start(self, deltas: Sequence[Delta], model: nn.Module, statistics: Mapping[Any, Any] | None) -> None:
        """Give fresh deltas their first values."""
        del deltas, model, statistics

    def needs(self) -> frozenset[str]:
        """The calibration statistics that `places` and `start` want."""
        return frozenset()

    def sites(self, model: nn.Module) -> list[Site]:
        """The sites whose statistics it wants."""
        del model
        return []

    @property
    def kinds_by_part(self) -> Mapping[int, tuple[str, ...]]:
        """The kinds of its own placements, by their `part`: 0, but in a combination."""
        return {0: self.kinds}

    @property
    def inserts(self) -> tuple[int, int]:
        """How many positions it puts before a sequence's tokens, and between context and target."""
        return 0, 0

    def minds_ties(self, placement: Placement) -> bool:
        """Whether a placement on one of two tied modules would act on half of what their weight does."""
        del placement
        return True

    def before_step(self, deltas: Sequence[Delta], step: int, steps: int) -> None:
        """Called before the forward passes of optimiser step `step` (from 1) of `steps`."""
        del deltas, step, steps

    def penalty(self, deltas: Sequence[Delta]) -> Tensor | None:
        """What is added to the loss of a step, if anything."""
        del deltas
        return None

    def after_step(self, deltas: Sequence[Delta], step: int, steps: int) -> None:
        """Called after the optimiser's step, while the gradients are still there."""
        del deltas, step, steps

    def rest(self, deltas: Sequence[Delta]) -> None:
        """Called when training pauses or ends, also by an error: forget what was drawn for a step."""
        del deltas

    def to_peft(self, deltas: Sequence[Delta]) -> tuple[dict[str, Any], Tensors]:
        """The fields of PEFT's config that describe these deltas, and their tensors by their names in the file."""
        return {}, named_tensors(deltas)

    @classmethod
    def is_in_peft(cls, config: Mapping[str, Any]) -> bool:
        """Whether a PEFT config is of this method."""
        return bool(cls.peft_type) and config.get("peft_type") == cls.peft_type

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Tensors, model: nn.Module) -> tuple[Self, Plan]:
        """Read the method and its plan from a PEFT config and the tensors beside it (names without PEFT's prefix)."""
        raise BadAdapterFile("the PEFT adapter", [f"lorakit reads no {cls.name} of PEFT's"])

    def read(self, deltas: Sequence[Delta], tensors: Tensors) -> list[str]:
        """Copy tensors (by their names in the file) into the deltas, taking them out of `tensors`; return faults."""
        return read_named(deltas, tensors)

    def to_json(self) -> dict[str, Any]:
        """The method's name and fields as plain JSON values."""
        return {"name": self.name} | asdict(self)

    @classmethod
    def told_faults(cls, told: Mapping[str, Any]) -> list[str]:
        """What is wrong with the types of the fields that a file tells."""
        return misfits(told, types_of(cls) | {"name": str}, "its method", closed=True)

    @classmethod
    def of_fields(cls, values: Mapping[str, Any]) -> Self:
        """Build from JSON values of the fields."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            have = [field.name for field in fields(cls)]
            raise UnknownName(f"{cls.name} has no field {unknown[0]!r}; {nearest(unknown[0], have)}")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Method:
        """Read a method written by `to_json`; unknown fields are an error."""
        values = dict(data)
        kind, preset = named(str(values.pop("name", "")))
        return kind.of_fields(dict(preset) | values)


def split(value: str | Sequence[str]) -> tuple[str, ...]:
    """Names out of a text with commas, or out of a sequence.

    >>> split("attn.q, attn.v")
    ('attn.q', 'attn.v')
    """
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    return tuple(part for part in parts if part)


def method_called(name: str) -> type[Method]:
    """The method class of the file `name` in `methods/`.

    >>> method_called("lora").__name__
    'LoRA'
    """
    module = registry.find(METHODS, name)
    return next(
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Method) and kind.__module__ == module.__name__
    )


def method_names() -> dict[str, tuple[type[Method], Mapping[str, Any]]]:
    """Every name that a method goes by: its file's and its presets', with the class and the fields the name sets."""
    kinds = {name: method_called(name) for name in registry.names(METHODS)}
    found: dict[str, tuple[type[Method], Mapping[str, Any]]] = {name: (kind, {}) for name, kind in kinds.items()}
    return found | {name: (kind, preset) for kind in kinds.values() for name, preset in kind.presets.items()}


def named(name: str) -> tuple[type[Method], Mapping[str, Any]]:
    """The class behind a method's or preset's name, and the fields that the name sets.

    Raises:
        UnknownName: nothing is called so; the message gives the nearest names.
    """
    names, wanted = method_names(), name.replace("_", "-")
    if wanted not in names:
        raise UnknownName(f"there is nothing called {name!r} in methods; {nearest(wanted, names)}")
    return names[wanted]


def method_of_peft(config: Mapping[str, Any]) -> type[Method]:
    """The method class that reads the PEFT folder with this config."""
    kinds = [method_called(name) for name in registry.names(METHODS)]
    found = next((kind for kind in kinds if kind.is_in_peft(config)), None)
    if found is None:
        told = str(config.get("peft_type"))
        have = {kind.peft_type for kind in kinds if kind.peft_type}
        raise UnknownName(f"lorakit has no method for PEFT's type {told!r}; {nearest(told, have)}")
    return found


def build(method: Method, placement: Placement, module: nn.Module, shared: nn.Module | None) -> Delta:
    """Make one delta of a plan, in its module's training mode."""
    if placement.kind == BIAS:
        delta: Delta = ReplacedBias(placement, module)
    elif placement.kind == MODULE:
        delta = ReplacedModule(placement, module)
    else:
        delta = method.build(placement, module, shared)
    return delta.train(module.training)
