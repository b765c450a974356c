"""The strongest directions of a weight, found by a few passes over its rows, with the error of each stated.

Legend: I in, O out, R directions that are wanted, K directions that are searched, G of one pass, P rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lorakit.analyse.spectra import EPSILON, effective_between, numerical_rank
from lorakit.analyse.subspace import Pair, factors, finite, refuse_above
from lorakit.core.exchange import Factored
from lorakit.core.values import Value, value_of
from lorakit.errors import NotComparable

EXACT: Final = 1024  # smaller sides up to this are decomposed exactly: about a second, and 8 MiB each
ROWS: Final = 1024  # of a block


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix as blocks of its rows in order; `rows` starts anew at each call, so that a file may be read in parts."""

    shape: tuple[int, int]  # (out, in)
    rows: Callable[[], Iterable[Tensor]]


Weight = Tensor | Value | Blocks


@dataclass(frozen=True, eq=False)
class Top:
    """The strongest singular values and directions of W, and what is known of the others.

    Within `error` of each value lies a singular value of W (the residual ‖Wᵀu - σv‖, while W v = σ u), and the i-th
    value is never above W's i-th. `error` is zero where the decomposition is exact.
    """

    values_R: Tensor
    left_OR: Tensor
    right_IR: Tensor
    error_R: Tensor
    shape: tuple[int, int]
    norm: float  # ‖W‖_F, exact
    effective: tuple[float, float]  # between these lies W's effective rank, taking the values as exact
    numerical: tuple[int, int]  # between these lies its numerical rank

    @property
    def captured(self) -> float:
        """The share of ‖W‖_F² that the directions hold; ‖W - U diag(σ) Vᵀ‖_F² is the rest, exactly."""
        return float(self.values_R.square().sum()) / self.norm**2 if self.norm else 0.0

    @property
    def stable(self) -> float:
        """‖W‖_F² / σ₁², at most (1 + error₁ / σ₁)² times too large where the first value found is W's first."""
        return self.norm**2 / float(self.values_R[0]) ** 2 if self.norm else 0.0


def blocks(weight: Weight, plus: Factored | Pair | None = None) -> Blocks:
    """W, or W + B A with the scale in B, as blocks of rows; a value is read anew for each pass.

    >>> found = blocks(torch.zeros(2, 2), plus=(torch.eye(1, 2), torch.ones(2, 1)))
    >>> [rows.tolist() for rows in found.rows()]
    [[[1.0, 0.0], [1.0, 0.0]]]
    """
    if isinstance(weight, Tensor):
        weight = value_of(weight)
    if isinstance(weight, Value):
        if len(weight.shape) != 2:
            raise NotComparable(f"a weight {tuple(weight.shape)} is no matrix (out, in); flatten its last dimensions")
        read = weight.read
        weight = Blocks((weight.shape[0], weight.shape[1]), lambda: read().split(ROWS))
    return weight if plus is None else _sum(weight, *factors(plus))


def _sum(weight: Blocks, a_RI: Tensor, b_OR: Tensor) -> Blocks:
    if (len(b_OR), a_RI.shape[1]) != weight.shape:
        raise NotComparable(
            f"an update {len(b_OR)} x {a_RI.shape[1]} does not fit a weight {weight.shape[0]} x {weight.shape[1]}; "
            "take the base that the adapter was trained on"
        )

    def rows() -> Iterator[Tensor]:
        start = 0
        for block_PI in weight.rows():
            yield torch.addmm(block_PI.double(), b_OR[start : start + len(block_PI)], a_RI)
            start += len(block_PI)

    return Blocks(weight.shape, rows)


def top(
    weight: Weight,
    rank: int,
    *,
    passes: int = 4,
    spare: int = 10,
    seed: int = 0,
    exact: int = EXACT,
) -> Top:
    """The `rank` strongest singular values and directions of W (out, in), in float64.

    Exact where the smaller side is at most `exact`, or below 2 (rank + spare). Else `rank + spare` random directions
    are multiplied by WᵀW once a pass, and W is decomposed in the span of all that come up (randomised block Krylov:
    Halko, Martinsson, Shkolnisky and Tygert 2011; Musco and Musco 2015). More passes make the errors smaller. The same
    seed gives the same numbers. In memory are one block, or all of W where it is exact, and passes (rank + spare)
    vectors of either side.

    Raises:
        NotComparable: more directions than W has, no pass, or W is not finite.

    >>> found = top(torch.diag(torch.tensor([3.0, 4.0])), 1)
    >>> found.values_R.tolist(), found.captured, found.numerical
    ([4.0], 0.64, (2, 2))
    """
    matrix, width = blocks(weight), rank + spare
    side = min(matrix.shape)
    refuse_above(rank, side)
    if passes < 1:
        raise NotComparable(f"no direction is found in {passes} passes over a weight; make 1 or more")
    if side <= exact or side < 2 * width:
        return _decomposed(matrix, rank)
    generator = torch.Generator().manual_seed(seed)
    fresh_IG = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64)
    bases: list[Tensor] = []
    images: list[Tensor] = []
    backs: list[Tensor] = []
    norm = 0.0
    for _ in range(min(passes, side // width)):
        # QR of all columns keeps the fresh ones orthonormal to the others even where W's rank is exhausted
        bases.append(torch.linalg.qr(torch.cat([*bases, fresh_IG], 1))[0][:, -width:])
        image_OG, fresh_IG, norm = _multiplied(matrix, bases[-1])
        images.append(image_OG)
        backs.append(fresh_IG)
    left_OK, values_K, mix_KK = torch.linalg.svd(torch.cat(images, 1), full_matrices=False)
    left_OR, values_R, mix_KR = left_OK[:, :rank], values_K[:rank], mix_KK[:rank].T
    right_IR = torch.cat(bases, 1) @ mix_KR
    residual_R = (torch.cat(backs, 1) @ mix_KR - right_IR * values_R.square()).norm(dim=0)  # ‖(WᵀW - σ²) v‖
    error_R = torch.fmin(residual_R / values_R, residual_R.sqrt())  # 0 / 0 of a zero matrix is passed over
    return Top(values_R, left_OR, right_IR, error_R, matrix.shape, norm, *_ranks(values_R, norm, matrix.shape))


def product(weight: Weight, right_IR: Tensor) -> Tensor:
    """W V (O, R) in float64, a block of rows at a time.

    >>> product(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 1).double()).tolist()
    [[3.0], [7.0]]
    """
    return torch.cat([finite(block_PI) @ right_IR for block_PI in blocks(weight).rows()])


def _multiplied(matrix: Blocks, fresh_IG: Tensor) -> tuple[Tensor, Tensor, float]:
    """W Q, Wᵀ W Q and ‖W‖_F, by one pass over the rows."""
    images, back_IG, energy = [], torch.zeros_like(fresh_IG), 0.0
    for each_PI in matrix.rows():
        block_PI = finite(each_PI)
        images.append(block_PI @ fresh_IG)
        back_IG.addmm_(block_PI.T, images[-1])
        energy += float(block_PI.norm()) ** 2
    return torch.cat(images), back_IG, energy**0.5


def _decomposed(matrix: Blocks, rank: int) -> Top:
    left_OK, values_K, right_KI = torch.linalg.svd(finite(torch.cat([*matrix.rows()])), full_matrices=False)
    left_OR, values_R, right_IR, norm = left_OK[:, :rank], values_K[:rank], right_KI[:rank].T, float(values_K.norm())
    return Top(values_R, left_OR, right_IR, 0 * values_R, matrix.shape, norm, *_ranks(values_K, norm, matrix.shape))


def _ranks(known_K: Tensor, norm: float, shape: tuple[int, int]) -> tuple[tuple[float, float], tuple[int, int]]:
    """What all singular values, or the strongest, tell of the effective and of the numerical rank."""
    sure, free = numerical_rank(known_K, shape), min(shape) - len(known_K)
    least, rest = float(known_K[0]) * max(shape) * EPSILON, norm**2 - float(known_K.square().sum())
    more = min(free, int(max(rest, 0.0) / least**2)) if least else 0
    return effective_between(known_K, norm, min(shape)), (sure, sure + more)
