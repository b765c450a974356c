"""A smaller adapter from an adapter: of each update the largest singular values, as many as are chosen.

Legend: I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.analyse.alike import refuse_twice
from lorakit.analyse.matrices import Fit, Thin, fit, lost
from lorakit.analyse.rebuilt import by_path, rebuilt, with_lost
from lorakit.analyse.subspace import Pair, directions, factors
from lorakit.core.exchange import Exchange, Factored, Update
from lorakit.errors import BadMethod


@dataclass(frozen=True, eq=False)
class Choosable:
    """What has a rank of its own: a matrix, or all of a layer's stacked experts, which share one."""

    spectra: tuple[Tensor, ...]  # the singular values of each matrix above rounding, the largest first
    cost: int  # numbers a rank: out + in, of each matrix

    @property
    def most(self) -> int:
        """The rank at which nothing is lost."""
        return max(len(values_R) for values_R in self.spectra)

    @property
    def energies(self) -> Tensor:
        """What each rank adds to ‖ΔW‖_F², (most,)."""
        padded = torch.nn.utils.rnn.pad_sequence([values_R.square() for values_R in self.spectra], batch_first=True)
        return padded.sum(0)


Choice = Callable[[Sequence[Choosable]], Sequence[int]]  # the ranks, each at most `most`; 0 leaves a matrix out


@dataclass(frozen=True, eq=False)
class Compressed:
    """A smaller adapter: its matrices, and the relative Frobenius distance of all updates, the cast included."""

    exchange: Exchange
    matrices: tuple[Factored, ...]
    dropped: tuple[str, ...]  # matrices that got no rank
    lost: float
    parameters: tuple[int, int]  # numbers in the file, before and after


def compress(
    adapter: Exchange, choose: Choice, dtype: torch.dtype | None = None, where: object = "the adapter"
) -> Compressed:
    """An adapter of chosen ranks, each update the nearest of its rank (Eckart and Young): A = √S Vᵀ, B = U √S, scale 1.

    What is not low-rank (heads, biases) is kept as it is. A fused layer's roles are compressed one by one where the
    file tells them, else the layer as a whole; stacked experts share a rank.

    Args:
        adapter: additive low-rank updates in any form: linear, embedding, convolution, experts.
        choose: `keeping(share)`, `at_most(rank)`, `within_ranks(total)` or `within_parameters(total)`.
        dtype: of the result; by default each layer's own. The distance is measured after the cast.
        where: what to call the adapter in messages.

    Raises:
        BadMethod: nothing would be left.
        BadAdapterFile: updates that are not additive and low-rank.

    >>> from lorakit.analyse.ranks import keeping
    >>> from lorakit.core.values import value_of
    >>> wide = Update("layer", value_of(torch.ones(2, 8)), value_of(torch.ones(8, 2)), alpha=2.0)
    >>> small = compress(Exchange("peft", (wide,)), keeping(1.0))
    >>> small.matrices[0].rank, small.parameters, small.lost < 1e-6
    (1, (32, 16), True)
    """
    refuse_twice(adapter, where)
    plain = by_path(adapter, where)
    matrices = {update.path: [_scaled(each, update.scale) for each in plain[update.path]] for update in adapter.updates}
    groups = [group for update in adapter.updates for group in _groups(update, matrices[update.path])]
    ranks = choose([_choosable(group) for group in groups])
    chosen = {each.name: rank for group, rank in zip(groups, ranks, strict=True) for each in group}
    fits: dict[str, Fit] = {}
    updates: list[Update] = []
    for update in adapter.updates:
        own = [(each, chosen[each.name]) for each in matrices[update.path]]
        pairs, found = _fitted(own, dtype or torch.promote_types(update.a.dtype, update.b.dtype))
        fits |= found
        if update.shift is not None or any(rank for _, rank in own):
            updates.append(rebuilt(update, pairs, _shift(update)))
    if not updates:
        raise BadMethod(f"nothing would be left of {where}, whose updates are zero or got no rank; allow more")
    made = replace(adapter, format="peft", updates=tuple(updates), config={}, header=None)
    kept, numbers = with_lost(made, fits), [sum(value.numel for value in each.values) for each in (adapter, made)]
    dropped = fits.keys() - {each.name for each in kept}
    return Compressed(made, kept, tuple(sorted(dropped)), lost(fits.values()), (numbers[0], numbers[1]))


def _scaled(plain: Factored, scale: float) -> Factored:
    """A matrix with its scale, in float64."""

    def read() -> Pair:
        a_RI, b_OR = plain.read()
        return a_RI.double(), b_OR.double() * scale

    return replace(plain, read=read)


def _groups(update: Update, matrices: list[Factored]) -> list[list[Factored]]:
    return [matrices] if update.form == "experts" else [[each] for each in matrices]


def _choosable(group: Sequence[Factored]) -> Choosable:
    return Choosable(tuple(directions(each).values_R for each in group), sum(sum(each.shape) for each in group))


def _fitted(ranked: Sequence[tuple[Factored, int]], dtype: torch.dtype) -> tuple[list[Pair], dict[str, Fit]]:
    pairs, fits = [], {}
    for each, rank in ranked:
        wanted = Thin(*factors(each))
        pair, fits[each.name] = fit(wanted, wanted.nearest(rank), dtype)
        pairs.append(pair)
    return pairs, fits


def _shift(update: Update) -> Tensor | None:
    """What a bias of B adds to the output, in its own dtype."""
    if update.shift is None:
        return None
    return (update.shift.read().double() * update.scale).to(update.shift.dtype)
