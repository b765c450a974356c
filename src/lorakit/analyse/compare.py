"""Two adapters of one base, layer by layer: how far their updates point the same way, and where they meet.

Legend: I in, O out, R rank of one, K rank of the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lorakit.analyse.alike import alike
from lorakit.analyse.subspace import directions, factors
from lorakit.core.exchange import Exchange, Factored, factored
from lorakit.errors import BadMethod


@dataclass(frozen=True)
class Within:
    """The share of ‖ΔW‖_F of one update that lies in the other's space, from 0 to 1.

    `inputs` is what it makes of the inputs that the other reads, ‖ΔW V Vᵀ‖; `outputs` what it writes where the other
    writes, ‖U Uᵀ ΔW‖; `both` is ‖U Uᵀ ΔW V Vᵀ‖, with U and V the other's left and right singular directions.
    """

    inputs: float
    outputs: float
    both: float


@dataclass(frozen=True)
class Meeting:
    """Two updates of one matrix; what is told of a zero update is 0."""

    name: str
    path: str
    role: str
    layer: int | None
    shape: tuple[int, int]  # (out, in)
    ranks: tuple[int, int]  # of the two updates as matrices, 0 of a zero one
    norms: tuple[float, float]  # ‖ΔW‖_F of each
    inner: float  # ⟨ΔW₁, ΔW₂⟩_F
    one: Within  # the first in the second's space
    other: Within  # the second in the first's

    @property
    def cosine(self) -> float:
        """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖); of independent random updates 0 in the mean, 1 / (out in) in the mean square."""
        return _cosine(self.inner, self.norms)

    @property
    def chance(self) -> tuple[Within, Within]:
        """`one` and `other` of random directions, in the mean square: sqrt(K / in), sqrt(K / out) and their product."""
        found = []
        for rank in reversed(self.ranks):
            outputs, inputs = (math.sqrt(rank / width) for width in self.shape)
            found.append(Within(inputs, outputs, inputs * outputs))
        return found[0], found[1]

    @property
    def in_sum(self) -> tuple[float, float]:
        """How much of each is in ΔW₁ + ΔW₂ along its own direction: 1 is all of it, 0 none, 2 twice."""
        return _in_sum(self.inner, self.norms)


@dataclass(frozen=True)
class Comparison:
    """Two adapters, matrix by matrix and in total, where a matrix that only one changes counts as 0 in the other."""

    pairs: tuple[Meeting, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]  # matrices that only the first, only the second changes
    norms: tuple[float, float]
    inner: float
    one: Within
    other: Within

    @property
    def cosine(self) -> float:
        """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖), with each adapter's updates taken as one long vector."""
        return _cosine(self.inner, self.norms)

    @property
    def in_sum(self) -> tuple[float, float]:
        """How much of each is in the sum of both along its own direction."""
        return _in_sum(self.inner, self.norms)


def compare(one: Exchange, other: Exchange, names: tuple[str, str] = ("the first", "the second")) -> Comparison:
    """Cosine and interference of two adapters' updates, from their thin factors alone.

    ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ), and ‖ΔW₁ V₂V₂ᵀ‖ = ‖S₁ (V₁ᵀV₂)‖, in float64. Names are for messages.

    Raises:
        BadMethod: adapters of other bases or shapes, or without a matrix in common; the message lists what differs.
        BadAdapterFile: updates that are not additive and low-rank.

    >>> from lorakit.core.exchange import Update
    >>> from lorakit.core.values import value_of
    >>> up = lambda sign: Update("layer", value_of(torch.eye(2, 3)), value_of(sign * torch.eye(4, 2)), alpha=2.0)
    >>> found = compare(Exchange("peft", (up(1),)), Exchange("peft", (up(-1),)))
    >>> round(found.cosine, 6), [round(each, 6) for each in found.in_sum]
    (-1.0, [0.0, 0.0])
    """
    both = alike(dict(zip(names, (one, other), strict=True)))
    mine, theirs = ({each.name: each for each in factored(both[name], where=name)} for name in names)
    pairs = [_pair(mine[name], theirs[name]) for name in mine if name in theirs]
    if not pairs:
        raise BadMethod(
            f"{names[0]} and {names[1]} change no matrix in common: the one {_some(mine)}, the other {_some(theirs)}"
        )
    only = tuple(name for name in mine if name not in theirs), tuple(name for name in theirs if name not in mine)
    norms = tuple(
        math.hypot(*(pair.norms[side] for pair in pairs), *(directions(own[name]).norm for name in only[side]))
        for side, own in enumerate((mine, theirs))
    )
    return Comparison(
        pairs=tuple(pairs),
        only=only,
        norms=(norms[0], norms[1]),
        inner=math.fsum(pair.inner for pair in pairs),
        one=_total([(pair.one, pair.norms[0]) for pair in pairs], norms[0]),
        other=_total([(pair.other, pair.norms[1]) for pair in pairs], norms[1]),
    )


def sign_conflicts(one: Factored, other: Factored) -> float:
    """The share of the entries that both change in which they pull apart; 1/2 by chance. Both updates are formed.

    >>> eye = Factored("x", "x", "x", None, 1, (2, 2), lambda: (torch.ones(1, 2), torch.tensor([[1.0], [0.0]])))
    >>> sign_conflicts(eye, eye)
    0.0
    """
    first_OI, second_OI = (b_OR @ a_RI for a_RI, b_OR in (one.read(), other.read()))
    product_OI = first_OI.sign() * second_OI.sign()
    return float((product_OI < 0).sum() / product_OI.count_nonzero().clamp(min=1))


def _pair(one: Factored, other: Factored) -> Meeting:
    (a_RI, b_OR), (a_KI, b_OK) = factors(one), factors(other)
    mine, theirs = directions((a_RI, b_OR)), directions((a_KI, b_OK))
    inputs_RK, outputs_RK = mine.right_IR.T @ theirs.right_IR, mine.left_OR.T @ theirs.left_OR

    def within(values_R: torch.Tensor, inputs_RK: torch.Tensor, outputs_RK: torch.Tensor) -> Within:
        s_R1 = values_R[:, None]
        parts = s_R1 * inputs_RK, s_R1 * outputs_RK, outputs_RK.T @ (s_R1 * inputs_RK)
        inputs, outputs, both = (float(part.norm() / values_R.norm()) if len(values_R) else 0.0 for part in parts)
        return Within(inputs, outputs, both)

    return Meeting(
        name=one.name,
        path=one.path,
        role=one.role,
        layer=one.layer,
        shape=one.shape,
        ranks=(len(mine.values_R), len(theirs.values_R)),
        norms=(mine.norm, theirs.norm),
        inner=float(((b_OR.T @ b_OK) * (a_RI @ a_KI.T)).sum()),
        one=within(mine.values_R, inputs_RK, outputs_RK),
        other=within(theirs.values_R, inputs_RK.T, outputs_RK.T),
    )


def _total(parts: list[tuple[Within, float]], norm: float) -> Within:
    """The shares of all updates together."""

    def share(values: Iterable[float]) -> float:
        return math.hypot(*values) / norm if norm else 0.0

    return Within(
        inputs=share(each.inputs * size for each, size in parts),
        outputs=share(each.outputs * size for each, size in parts),
        both=share(each.both * size for each, size in parts),
    )


def _cosine(inner: float, norms: tuple[float, float]) -> float:
    return inner / (norms[0] * norms[1]) if all(norms) else 0.0


def _in_sum(inner: float, norms: tuple[float, float]) -> tuple[float, float]:
    first, second = (1 + inner / norm**2 if norm else 0.0 for norm in norms)
    return first, second


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
