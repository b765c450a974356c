"""Combine adapters of one base into one, by a recipe, and say what of them is lost.

Legend: I in, O out, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from lorakit.analyse.alike import alike
from lorakit.analyse.matrices import Fit, fit, lost
from lorakit.analyse.rebuilt import by_path, rebuilt, with_lost
from lorakit.analyse.recipes import Recipe, Task
from lorakit.core.exchange import Exchange, Factored, Update, layer_of
from lorakit.core.values import Value
from lorakit.errors import BadMethod


@dataclass(frozen=True, eq=False)
class Merged:
    """An adapter made of others.

    `lost` is the relative Frobenius distance of each matrix from what was wanted (Σ w ΔW, or what TIES and DARE make of
    the entries), the cast to the files' dtype included; each of `matrices` has its own.
    """

    exchange: Exchange
    matrices: tuple[Factored, ...]
    lost: float
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Member:
    """One adapter's update of a layer: its matrices, by name and without the scale, and its weight times its scale."""

    update: Update
    matrices: Mapping[str, Factored]
    strength: float

    def task(self, name: str) -> Task:
        a_RI, b_OR = self.matrices[name].read()
        return Task(name, a_RI, b_OR, self.strength)


def merge_adapters(
    adapters: Mapping[str, Exchange],
    weights: Mapping[str, float],
    recipe: Recipe,
    dtype: torch.dtype | None = None,
) -> Merged:
    """Combine adapters, by name, with weights of either sign; one of weight 0 is left out.

    A layer that only some of them change counts as unchanged by the others. Biases of B are added up with their weights
    by every recipe. A tensor that stands in place of the base's own (a head) cannot be weighted: it is taken from the
    adapters of positive weight that have it, where they agree.

    Args:
        adapters: of one base, with additive low-rank updates.
        weights: a number for each of them.
        recipe: of `lorakit.analyse.recipes`.
        dtype: of the result; by default the widest of the adapters' own.

    Raises:
        BadMethod: weights that do not fit, or adapters that cannot be combined; all reasons are given.
        BadAdapterFile: updates that are not additive and low-rank.

    >>> from lorakit.analyse.recipes import recipe
    >>> from lorakit.core.exchange import Update
    >>> from lorakit.core.values import value_of
    >>> one = Exchange("peft", (Update("layer", value_of(torch.eye(2, 3)), value_of(torch.ones(4, 2)), alpha=2.0),))
    >>> made = merge_adapters({"a": one, "b": one}, {"a": 2.0, "b": -1.0}, recipe("concatenation"))
    >>> made.exchange.updates[0].rank, made.lost
    (3, 0.0)
    """
    _check_weights(adapters, weights)
    own = alike({name: adapter for name, adapter in adapters.items() if weights[name]})
    whole, notes = _whole(own, weights)
    found = [_combined(members, recipe, dtype) for members in _by_layer(own, weights)]
    base, task = (next(filter(None, told), None) for told in zip(*map(_names, own.values()), strict=True))
    exchange = Exchange("peft", tuple(update for update, _ in found), whole, base, task)
    fits = {name: each for _, parts in found for name, each in parts.items()}
    return Merged(exchange, with_lost(exchange, fits), lost(fits.values()), notes)


def _names(adapter: Exchange) -> tuple[str | None, str | None]:
    return adapter.base, adapter.task


def _check_weights(adapters: Mapping[str, Exchange], weights: Mapping[str, float]) -> None:
    if adapters.keys() != weights.keys():
        raise BadMethod(f"every adapter needs a weight: the adapters are {', '.join(adapters)}, the weights are for "
                        f"{', '.join(weights)}")  # fmt: skip
    if not any(weights.values()) or not all(map(math.isfinite, weights.values())):
        raise BadMethod(f"adapters need finite weights, of which one is not 0, not {dict(weights)}")


def _by_layer(own: Mapping[str, Exchange], weights: Mapping[str, float]) -> list[list[_Member]]:
    """The updates of each layer, in the order of the layers."""
    found: dict[str, list[_Member]] = {}
    for name, adapter in own.items():
        matrices = by_path(adapter, where=name)
        for update in adapter.updates:
            named = {each.name: each for each in matrices[update.path]}
            found.setdefault(update.path, []).append(_Member(update, named, weights[name] * update.scale))
    return [found[path] for path in sorted(found, key=lambda path: (layer_of(path) is None, layer_of(path) or 0, path))]


def _combined(members: Sequence[_Member], recipe: Recipe, dtype: torch.dtype | None) -> tuple[Update, dict[str, Fit]]:
    own = reduce(torch.promote_types, (value.dtype for each in members for value in (each.update.a, each.update.b)))
    pairs, fits = [], {}
    for name in members[0].matrices:
        tasks = [member.task(name) for member in members]
        wanted = recipe.wanted(tasks)
        pair, fits[name] = fit(wanted, recipe.factors(tasks, wanted), dtype or own)
        pairs.append(pair)
    shifts = [each.strength * each.update.shift.read().double() for each in members if each.update.shift]
    shift_O = torch.stack(shifts).sum(0).to(dtype or own) if shifts else None
    return rebuilt(members[0].update, pairs, shift_O), fits


def _whole(own: Mapping[str, Exchange], weights: Mapping[str, float]) -> tuple[dict[str, Value], tuple[str, ...]]:
    """The tensors in place of the base's own, and what is to be said of them."""
    found: dict[str, tuple[str, Value]] = {}
    faults, notes = [], []
    for name, adapter in own.items():
        for key, value in adapter.whole.items():
            owner, known = found.setdefault(key, (name, value))
            if weights[name] < 0:
                faults.append(f"{name} has {key} in place of the base's own, which no negative weight can take away")
            elif not torch.equal(known.read(), value.read()):
                faults.append(f"{owner} and {name} have different values of {key} in place of the base's own")
            elif weights[name] != 1:
                notes.append(f"{key} is taken from {name} as it is: what stands in place of the base's has no weight")
    if faults:
        raise BadMethod(f"these adapters cannot be combined: {'; '.join(faults)}")
    return {key: value for key, (_, value) in found.items()}, tuple(notes)
