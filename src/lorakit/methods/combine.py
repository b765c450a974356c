"""Several methods as one adapter (Hu et al. 2021, arXiv:2106.09685, appendix E: LoRA+PE and LoRA+PL)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from lorakit.core.checked import misfits, types_of
from lorakit.core.delta import Delta
from lorakit.core.method import Method, Names, Tensors, named, split
from lorakit.core.plan import BIAS, MODULE, Placement, Plan
from lorakit.core.sites import Site
from lorakit.errors import BadMethod


@dataclass(frozen=True, kw_only=True)
class Combine(Method):
    """The parts act together, at one layer in their order: h = f2(f1(W x)); trained by one loss, saved in one folder.

    A part is a method, the name of one with its defaults, or a mapping with a name and fields. What a part cannot do
    (be merged, be told apart by row), the whole cannot.

    Example:
        >>> [part.name for part in Combine(parts="lora,prefix-embedding").methods]
        ['lora', 'prefix-embedding']

    Paper: Hu et al. 2021, https://arxiv.org/abs/2106.09685, appendix E; the defaults are its LoRA+PE.
    """

    name: ClassVar[str] = "combine"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "lora-prefix-layer": {"parts": ("lora", "prefix-embedding", "prefix-layer")}
    }

    parts: tuple[Any, ...] | str = ("lora", "prefix-embedding")  # methods by name, or tables of a name and fields

    def __post_init__(self) -> None:
        super().__post_init__()
        given = split(self.parts) if isinstance(self.parts, str) else self.parts
        parts = [part for each in given for part in _parts_of(each)] if isinstance(given, list | tuple) else []
        if len(parts) < 2:
            raise BadMethod(f"Combine cannot be built so: parts={self.parts!r} must be two methods or more")
        train = tuple(dict.fromkeys(name for method in (self, *parts) for name in method.train))
        found = {
            "train": train,
            "parts": tuple(replace(part, train=train) for part in parts),
            "waives": {law: why for part in parts for law, why in part.waives.items()},
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)
        self._refuse_other_places()
        self._refuse_two_weights()

    def _refuse_other_places(self) -> None:
        inserts = {part.inserts: part.name for part in self.methods if any(part.inserts)}
        if len(inserts) > 1:
            told = " and ".join(f"{name} {numbers}" for numbers, name in inserts.items())
            raise BadMethod(f"Combine cannot be built so: its parts share the places that they put before and after a "
                            f"context, but have different numbers of them: {told}")  # fmt: skip

    def _refuse_two_weights(self) -> None:
        found = [part.name for part in self.methods if part.replaces_weights]
        if len(found) > 1:
            raise BadMethod(f"Combine cannot be built so: its parts {' and '.join(found)} both stand in for the "
                            "model's weights; keep one of them")  # fmt: skip

    @property
    def methods(self) -> tuple[Method, ...]:
        """The parts."""
        return cast(tuple[Method, ...], self.parts)

    @property
    def kinds_by_part(self) -> Mapping[int, tuple[str, ...]]:
        """The kinds of each part."""
        return {number: part.kinds for number, part in self._numbered()}

    @property
    def inserts(self) -> tuple[int, int]:
        """The places of the parts that put any into the sequence; they share them."""
        prefix, infix = 0, 0
        for part in self.methods:  # in a form that torch.compile follows
            before, between = part.inserts
            prefix, infix = max(prefix, before), max(infix, between)
        return prefix, infix

    def _numbered(self) -> Iterator[tuple[int, Method]]:
        return enumerate(self.methods, start=1)

    def _part_of(self, placement: Placement) -> Method:
        return self.methods[placement.part - 1]

    def needs(self) -> frozenset[str]:
        """The statistics that any part wants."""
        return frozenset().union(*(part.needs() for part in self.methods))

    def sites(self, model: nn.Module) -> list[Site]:
        """The sites whose statistics any part wants."""
        return list(dict.fromkeys(site for part in self.methods if part.needs() for site in part.sites(model)))

    def places(self, model: nn.Module, statistics: Mapping[Any, Any] | None) -> Sequence[Placement]:
        """Each part's placements with its number; at one layer, in the order in which they have to act.

        Raises:
            BadMethod: two parts train the same bias or read the base's weight at one layer, or one adapts a module that
                another trains whole.
        """
        found = ((number, each) for number, part in self._numbered() for each in part.places(model, statistics))
        own = self._beside_modules([replace(each, part=number) for number, each in found])
        self._refuse_twice([each for each in own if each.kind == BIAS], "train the bias")
        self._refuse_twice([each for each in own if self._is_first(each)], "read the base's weight")
        return sorted(own, key=self._turn)

    def _beside_modules(self, placements: Sequence[Placement]) -> list[Placement]:
        """The placements, less those of what another part trains anyway, since it trains the whole module."""
        whole: dict[str, Placement] = {}
        for each in placements:
            if each.kind == MODULE:
                whole.setdefault(each.path, each)
        for each in placements:
            if each.path in whole and not each.is_replaced and not self._part_of(each).replaces_weights:
                names = f"{self._part_of(each).name} and {self._part_of(whole[each.path]).name}"
                raise BadMethod(f"{each.path} is adapted and trained whole at once, by {names}; leave it to one of "
                                "them")  # fmt: skip
        return [each for each in placements if whole.get(each.path, each) is each]

    def _turn(self, placement: Placement) -> int:
        """When it acts: weights are there before what reads or changes them, and what reads them before the rest."""
        if self._part_of(placement).replaces_weights and not placement.is_replaced:
            return 0
        return 1 if self._is_first(placement) else 2 if placement.kind == BIAS else 3

    def _is_first(self, placement: Placement) -> bool:
        return self._part_of(placement).reads_base and not placement.is_replaced

    def _refuse_twice(self, placements: Sequence[Placement], what: str) -> None:
        seen: dict[str, Placement] = {}
        for each in placements:
            other = seen.setdefault(each.path, each)
            if other.part != each.part:
                both = f"{self._part_of(other).name} and {self._part_of(each).name}"
                raise BadMethod(f"{both} both {what} of {each.path}; leave it to one of them")

    def check(self, plan: Plan, model: nn.Module) -> None:
        """Each part checks its placements."""
        for number, part in self._numbered():
            part.check(_own(plan, number), model)

    def shared(self, plan: Plan, model: nn.Module) -> nn.Module:
        """What the deltas of each part have in common."""
        return Together([part.shared(_own(plan, number), model) for number, part in self._numbered()])

    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> Delta:
        """The part's delta."""
        return self._part_of(placement).build(placement, module, cast(Together, shared).of[placement.part - 1])

    def start(self, deltas: Sequence[Delta], model: nn.Module, statistics: Mapping[Any, Any] | None) -> None:
        """Each part starts its deltas."""
        for part, own in self._with(deltas):
            part.start(own, model, statistics)

    def _with(self, deltas: Sequence[Delta]) -> Iterator[tuple[Method, list[Delta]]]:
        """Each part with its deltas."""
        for number, part in self._numbered():
            yield part, [delta for delta in deltas if delta.placement.part == number]

    def minds_ties(self, placement: Placement) -> bool:
        """Whether the part does."""
        return not placement.part or self._part_of(placement).minds_ties(placement)

    def before_step(self, deltas: Sequence[Delta], step: int, steps: int) -> None:
        """Each part's."""
        for part, own in self._with(deltas):
            part.before_step(own, step, steps)

    def penalty(self, deltas: Sequence[Delta]) -> Tensor | None:
        """The sum of the parts' penalties."""
        found = [added for part, own in self._with(deltas) if (added := part.penalty(own)) is not None]
        return sum(found[1:], found[0]) if found else None

    def after_step(self, deltas: Sequence[Delta], step: int, steps: int) -> None:
        """Each part's."""
        for part, own in self._with(deltas):
            part.after_step(own, step, steps)

    def rest(self, deltas: Sequence[Delta]) -> None:
        """Each part's."""
        for part, own in self._with(deltas):
            part.rest(own)

    def to_peft(self, deltas: Sequence[Delta]) -> tuple[dict[str, Any], Tensors]:
        """The parts' tensors, those of part 2 under `part_2`; PEFT has no such adapter."""
        tensors: Tensors = {}
        for number, (part, own) in enumerate(self._with(deltas), start=1):
            tensors |= {f"part_{number}.{key}": value for key, value in part.to_peft(own)[1].items()}
        return {}, tensors

    def read(self, deltas: Sequence[Delta], tensors: Tensors) -> list[str]:
        """Each part reads its tensors."""
        faults: list[str] = []
        for number, (part, own) in enumerate(self._with(deltas), start=1):
            prefix = f"part_{number}."
            told = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
            faults += [f"{prefix}{fault}" for fault in part.read(own, told)]
            tensors |= {prefix + key: value for key, value in told.items()}  # what it did not know
        return faults

    def to_json(self) -> dict[str, Any]:
        """The parts as tables of their own."""
        return {"name": self.name} | asdict(self) | {"parts": [part.to_json() for part in self.methods]}

    @classmethod
    def told_faults(cls, told: Mapping[str, Any]) -> list[str]:
        """What is wrong with the fields, and with those of each part."""
        parts = told.get("parts")
        faults = super().told_faults({key: value for key, value in told.items() if key != "parts"})
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            return [*faults, "its method's parts are not a list of JSON objects"]
        for part in parts:
            kind, _ = named(str(part.get("name")))
            faults += [f"its method has a {cls.name} among its parts"] if kind is cls else kind.told_faults(part)
        return faults


class Together(nn.Module):
    """What each part's deltas have in common."""

    def __init__(self, of: list[nn.Module | None]) -> None:
        super().__init__()
        self.of = of  # each part's deltas hold their own


def combine(*parts: Method | str | Mapping[str, Any], train: Names = ()) -> Combine:
    """Several methods as one.

    >>> both = combine("lora", {"name": "bitfit", "targets": "norm.mlp"})
    >>> both == Method.from_json(both.to_json())
    True

    Args:
        parts: methods, their names, or mappings with a name and fields.
        train: modules trained whole, e.g. a classifier.
    """
    return Combine(parts=parts, train=train)


def _parts_of(given: object) -> tuple[Method, ...]:
    """The method that is meant; those of a combination one by one."""
    if isinstance(given, str):
        given = {"name": given}
    if isinstance(given, Mapping):
        _refuse_misfits(given)
    found = Method.from_json(given) if isinstance(given, Mapping) else given
    if not isinstance(found, Method):
        raise BadMethod(f"a part of Combine is a method, a name or a table with a name, not {found!r}")
    return found.methods if isinstance(found, Combine) else (found,)


def _refuse_misfits(part: Mapping[str, Any]) -> None:
    """Refuse fields whose values are of another type than they are declared with; `from_json` refuses unknown ones."""
    name = str(part.get("name", ""))
    types = types_of(named(name)[0])
    told = {key: list(value) if isinstance(value, tuple) else value for key, value in part.items() if key in types}
    if faults := misfits(told, types, f"its part {name}"):
        raise BadMethod(f"Combine cannot be built so: {'; '.join(faults)}")


def _own(plan: Plan, number: int) -> Plan:
    """The placements of one part, and the modules trained whole, which are everybody's."""
    return tuple(placement for placement in plan if placement.part == number or placement.kind == MODULE)
