"""What a report is about: adapters, and of their base as much as is at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations

from lorakit.analyse.effect import Effect
from lorakit.analyse.examples import Disagreement
from lorakit.core.exchange import Exchange, Factored, factored
from lorakit.core.values import Value
from lorakit.errors import BadAdapterFile

FEW = 3  # adapters of which every pair is compared; of more, each is compared with the first


@dataclass(frozen=True, eq=False)
class Study:
    """Adapters by name, and what is known besides; each section of a report takes from it what it can use."""

    adapters: Mapping[str, Exchange]
    weights: Mapping[str, Value] = field(default_factory=dict)  # W (out, in) by path; empty without a base
    effects: Mapping[str, Effect] = field(default_factory=dict)  # by adapter; empty without text
    disagreements: Mapping[str, Sequence[Disagreement]] = field(default_factory=dict)
    token: Callable[[int], str] = str  # the text of a token's id

    @cached_property
    def matrices(self) -> dict[str, list[Factored]]:
        """Every adapter's updates; read anew whenever they are used.

        Raises:
            BadAdapterFile: updates that are not additive, not of low rank, or not finite.
        """
        return {name: factored(exchange, where=name) for name, exchange in self.adapters.items()}

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The adapters that are compared."""
        names = list(self.adapters)
        return [pair for pair in combinations(names, 2) if len(names) <= FEW or pair[0] == names[0]]

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The numbers of all layers that an adapter changes."""
        return tuple(sorted({each.layer for own in self.matrices.values() for each in own if each.layer is not None}))

    @property
    def middle(self) -> int | None:
        """The layer that stands for all, as the paper's 48 of 96."""
        return self.layers[len(self.layers) // 2] if self.layers else None

    @property
    def shown(self) -> tuple[int, ...]:
        """The layers of figures 6 and 7: the first, those at a third and two thirds, and the last."""
        count = len(self.layers)
        return tuple(dict.fromkeys(self.layers[place] for place in (0, count // 3, 2 * count // 3, count - 1) if count))

    def at(self, name: str, layer: int | None) -> list[Factored]:
        """An adapter's updates in one layer."""
        return [each for each in self.matrices[name] if each.layer == layer]

    def both(self, one: str, other: str, layer: int | None) -> Iterator[tuple[Factored, Factored]]:
        """The updates of one layer that two adapters have in common."""
        theirs = {each.name: each for each in self.at(other, layer)}
        yield from ((each, theirs[each.name]) for each in self.at(one, layer) if each.name in theirs)

    def weight(self, update: Factored) -> Value | None:
        """W (out, in) of an update; None where no base is at hand.

        Raises:
            BadAdapterFile: the base has no such matrix, or one of another shape.
        """
        if not self.weights:
            return None
        whole = self.weights.get(update.path)
        if whole is None:
            raise BadAdapterFile("the adapter", [f"its base has no matrix {update.path}; name the base it belongs to"])
        cut = whole.then(update.cut, update.shape)
        out, inner = whole.shape[-2:]
        if inner != update.shape[1] or out < update.shape[0]:
            fault = f"{update.path} is {out} x {inner} in this base, and {update.shape[0]} x {update.shape[1]} for it"
            raise BadAdapterFile("the adapter", [fault])
        return cut
