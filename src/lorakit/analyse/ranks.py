"""How many ranks each update of a smaller adapter gets: choices for `compress`.

Legend: R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.analyse.compress import Choice, Choosable
from lorakit.analyse.spectra import smallest_rank
from lorakit.errors import BadMethod


def keeping(share: float) -> Choice:
    """The smallest ranks that keep this share of ‖ΔW‖_F² of each matrix; stacked experts take the largest of theirs.

    The relative error of each is then at most sqrt(1 - share).

    Raises:
        BadMethod: a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise BadMethod(f"no rank keeps {share:g} of an update; give a share above 0 and at most 1")

    def choose(updates: Sequence[Choosable]) -> list[int]:
        return [max(smallest_rank(s_R, share) if len(s_R) else 0 for s_R in each.spectra) for each in updates]

    return choose


def at_most(rank: int) -> Choice:
    """One rank for all, or a matrix's own where that is less.

    Raises:
        BadMethod: a rank below 1.
    """
    _refuse_none(rank, "rank")
    return lambda updates: [min(rank, each.most) for each in updates]


def within_ranks(total: int) -> Choice:
    """A number of ranks in all, given where singular values are largest: the least error for that number.

    One rank of a layer's E stacked experts counts E times.

    Raises:
        BadMethod: a total below 1.
    """
    _refuse_none(total, "ranks")
    return lambda updates: _greedy(updates, total, [len(each.spectra) for each in updates])


def within_parameters(total: int) -> Choice:
    """A number of parameters (of A and B) in all, given where they add most to ‖ΔW‖_F² each.

    Raises:
        BadMethod: a total below 1.
    """
    _refuse_none(total, "parameters")
    return lambda updates: _greedy(updates, total, [each.cost for each in updates])


def _greedy(updates: Sequence[Choosable], total: int, costs: Sequence[int]) -> list[int]:
    """What adds most for its cost comes first; what is too dear for the rest of the total is passed over."""
    gains = [(gain / costs[n], n) for n, each in enumerate(updates) for gain in each.energies.tolist()]
    ranks = [0] * len(updates)
    for _, number in sorted(gains, key=lambda entry: -entry[0]):
        if costs[number] <= total:
            ranks[number] += 1
            total -= costs[number]
    return ranks


def _refuse_none(number: int, what: str) -> None:
    if number < 1:
        raise BadMethod(f"an adapter cannot be compressed to {number} {what}; give 1 or more")
