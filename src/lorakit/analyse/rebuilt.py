"""Put new factors of an adapter's matrices back together as the updates that a file holds.

Legend: E experts, I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorakit.analyse.matrices import Fit, lost
from lorakit.analyse.subspace import Pair
from lorakit.core.exchange import Exchange, Factored, Update, factored
from lorakit.core.values import value_of


def rebuilt(update: Update, factors: Sequence[Pair], shift_O: Tensor | None = None) -> Update:
    """An update of the same layer whose matrices, in the order of `factored`, are these products B A; scale 1.

    A fused layer's roles get rows of A of their own, and columns of B that are zero outside their output units; those
    of rank 0 are left out. Stacked experts get one rank, and every update a rank of 1 or more, by adding zeros.
    """
    most = max(1, *(len(a_RI) for a_RI, _ in factors))
    if update.form == "experts":
        a, b = (torch.stack(each) for each in zip(*(_widened(pair, most) for pair in factors), strict=True))
        return _of(update, a, b, most, shift_O)
    first, *others = factors
    parts = factors if any(len(a_RI) for a_RI, _ in factors) else [_widened(first, 1), *others]
    slices, columns, start = [], [b_OR for _, b_OR in parts], 0
    for number, (part, (a_RI, b_OR)) in enumerate(zip(update.slices, parts, strict=False)):
        columns[number] = part.where.put(b_OR.new_zeros(update.b.shape[0], len(a_RI)), b_OR, 0)
        slices += [replace(part, start=start, rank=len(a_RI))] if len(a_RI) else []
        start += len(a_RI)
    a_RI, b_OR = torch.cat([a_RI for a_RI, _ in parts]), torch.cat(columns, 1)
    a, b = a_RI.reshape(len(a_RI), *update.a.shape[1:]), b_OR.reshape(*b_OR.shape, *update.b.shape[2:])
    return replace(_of(update, a, b, len(a), shift_O), slices=tuple(slices))


def _widened(pair: Pair, rank: int) -> Pair:
    a_RI, b_OR = pair
    missing = rank - len(a_RI)
    return pad(a_RI, (0, 0, 0, missing)), pad(b_OR, (0, missing))


def _of(update: Update, a: Tensor, b: Tensor, rank: int, shift_O: Tensor | None) -> Update:
    return replace(
        update,
        a=value_of(a.contiguous()),
        b=value_of(b.contiguous()),
        alpha=float(rank),
        rooted=False,
        shift=None if shift_O is None else value_of(shift_O),
        diagonal=None,
    )


def by_path(exchange: Exchange, where: object) -> dict[str, list[Factored]]:
    """`factored`, by the paths of the updates, but without their scales, which would be rounded to B's float32."""
    plain = tuple(replace(update, alpha=float(update.rank), rooted=False) for update in exchange.updates)
    found: dict[str, list[Factored]] = {}
    for each in factored(replace(exchange, updates=plain), where=where):
        found.setdefault(each.path, []).append(each)
    return found


def with_lost(exchange: Exchange, fits: Mapping[str, Fit]) -> tuple[Factored, ...]:
    """The matrices of an adapter, each with what its factors lose."""
    return tuple(replace(each, lost=lost([fits[each.name]])) for each in factored(exchange))
