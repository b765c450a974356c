"""What a report is about: adapters, and of their base as much as is at hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations

from lorakit.analyse.effect import Effect
from lorakit.analyse.examples import Disagreement
from lorakit.analyse.spectra import Spectrum, spectra
from lorakit.core.exchange import Exchange, Factored, factored, role_of
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
    lost: Mapping[str, float] = field(default_factory=dict)  # the share of ‖ΔW‖_F that an adapter's updates leave out

    @cached_property
    def matrices(self) -> dict[str, list[Factored]]:
        """Every adapter's updates; read anew whenever they are used.

        Raises:
            BadAdapterFile: updates that are not additive, not of low rank, or not finite.
        """
        found = {name: factored(exchange, where=name) for name, exchange in self.adapters.items()}
        return {name: [replace(each, role=self.role(each.path, each.role)) for each in own]
                for name, own in found.items()}  # fmt: skip

    @cached_property
    def spectra(self) -> dict[str, list[Spectrum]]:
        """Of every adapter's updates; numbers alone, so that they are kept."""
        return {name: spectra(own) for name, own in self.matrices.items()}

    @cached_property
    def _stacks(self) -> dict[str, set[str]]:
        """Where the layers of each role are: several places in a model with an encoder and a decoder."""
        found: dict[str, set[str]] = {}
        for exchange in self.adapters.values():
            for update in exchange.updates:
                found.setdefault(role_of(update.path), set()).add(_stack(update.path))
        return found

    def role(self, path: str, role: str | None = None) -> str:
        """What a layer is called in its block, and in which stack of blocks, where several have layers so called."""
        own = role_of(path)
        return f"{_stack(path)} {role or own}".strip() if len(self._stacks.get(own, ())) > 1 else role or own

    def by_role(self, name: str, layer: int | None) -> dict[str, Factored]:
        """An adapter's updates in one layer by what they are called; of stacked experts the first."""
        found: dict[str, Factored] = {}
        for each in self.at(name, layer):
            found.setdefault(each.role, each)
        return found

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
        """The layers of figures 6 and 7."""
        return picked(self.layers)

    def at(self, name: str, layer: int | None) -> list[Factored]:
        """An adapter's updates in one layer."""
        return [each for each in self.matrices[name] if each.layer == layer]

    def both(self, one: str, other: str, layer: int | None) -> Iterator[tuple[Factored, Factored]]:
        """The updates of one layer that two adapters have in common; of stacked experts the first."""
        theirs = {each.name: each for each in self.at(other, layer)}
        mine = self.by_role(one, layer).values()
        yield from ((each, theirs[each.name]) for each in mine if each.name in theirs)

    def meets(self, one: str, other: str) -> bool:
        """Whether two adapters change a matrix in common."""
        names = [{each.name for each in self.matrices[name]} for name in (one, other)]
        return bool(names[0] & names[1])

    def weight(self, update: Factored) -> Value | None:
        """W (out, in) of an update; None where no base is at hand.

        Raises:
            BadAdapterFile: the base has no such matrix, or one of another shape.
        """
        if not self.weights:
            return None
        whole = self.weights.get(update.path)
        if whole is None:
            raise BadAdapterFile("the adapter", [f"its base has no matrix {update.path}; name the base it belongs to, "
                                 "or none where its files name weights otherwise (one matrix an expert)"])  # fmt: skip
        cut = whole.then(update.cut, update.shape)
        out, inner = whole.shape[-2:]
        if inner != update.shape[1] or out < update.shape[0]:
            fault = f"{update.path} is {out} x {inner} in this base, and {update.shape[0]} x {update.shape[1]} for it"
            raise BadAdapterFile("the adapter", [fault])
        return cut


def picked(layers: Sequence[int]) -> tuple[int, ...]:
    """The first layer, those at a third and two thirds, and the last.

    >>> picked(range(30)), picked([7])
    ((0, 10, 20, 29), (7,))
    """
    count = len(layers)
    return tuple(dict.fromkeys(layers[place] for place in (0, count // 3, 2 * count // 3, count - 1) if count))


def called(update: Factored | Spectrum) -> str:
    """The role of an update, and of stacked experts which one it is."""
    mark = update.name[len(update.path) :]
    return update.role + (mark if mark[1:-1].isdigit() else "")


def _stack(path: str) -> str:
    """The path before the layer's number, or before the last name where it has none.

    >>> _stack("decoder.block.3.layer.0.SelfAttention.q"), _stack("lm_head")
    ('decoder.block', '')
    """
    found = re.search(r"(?:^|\.)\d+\.", path)
    return path[: found.start()] if found else path.rpartition(".")[0]
