"""Smooth and sparse principal components (SpatPCA: Wang and Huang 2017, arXiv:1501.03221).

Φ minimises -tr(Φᵀ S Φ) + τ₁ tr(Φᵀ Ω Φ) + τ₂ Σ|φ| subject to ΦᵀΦ = 1, for a second moment S of centred data and a
roughness Ω. Here S has the largest eigenvalue 1 and Ω the mean diagonal 1, so that τ₁ and τ₂ mean the same everywhere.

Legend: D channels, R components.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.core.statistics import Moment, merged
from lorakit.errors import BadMethod
from lorakit.inits._matrix import precise, principal

SMOOTHNESS: Final = (0.0, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # τ₁ that are tried
SPARSITY: Final = (0.0, 0.1, 0.3, 1.0)  # τ₂ that are tried, times 1/√D
RHO: Final = 4.0  # ADMM's penalty; above 1, the largest eigenvalue of S


@dataclass(frozen=True, eq=False)
class Problem:
    """S and Ω of all data, and S of each part with its number of tokens, all divided by one number."""

    moment_DD: Tensor
    roughness_DD: Tensor
    parts: tuple[tuple[int, Tensor], ...]


def problem(moments: Sequence[Moment], roughness_DD: Tensor, device: torch.device) -> Problem:
    """Centre the parts by the mean of all, and scale S and Ω to unit size.

    Raises:
        BadMethod: fewer than two parts with data, or data that do not vary.
    """
    some = [moment for moment in moments if moment.tokens]
    if len(some) < 2:
        raise BadMethod("cross-validation needs at least two sequences; calibrate on more")
    whole = merged(some)
    top = float(torch.linalg.eigvalsh(whole.covariance_DD.double())[-1])
    if top <= 0:
        raise BadMethod("what the layer sees does not vary in the calibration data; calibrate on other data")
    parts = tuple((each.tokens, precise(each.about(whole.mean_D), device) / top) for each in some)
    level = roughness_DD.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    return Problem(precise(whole.covariance_DD, device) / top, precise(roughness_DD / level, device), parts)


def components(moment_DD: Tensor, roughness_DD: Tensor, rank: int, smooth: float, sparse: float) -> Tensor:
    """Φ (D, R), orthonormal, for one pair of weights.

    >>> moment_DD = torch.diag(torch.tensor([3.0, 1.0, 2.0]).double())
    >>> components(moment_DD, torch.zeros(3, 3), 1, smooth=0.0, sparse=0.0).T.tolist()
    [[1.0, 0.0, 0.0]]
    """
    return next(path(moment_DD - smooth * roughness_DD, rank, [sparse]))


def path(gain_DD: Tensor, rank: int, sparsity: Sequence[float]) -> Iterator[Tensor]:
    """Φ for G = S - τ₁Ω and each τ₂: G's eigenvectors where τ₂ = 0, which is exact, else what ADMM makes of them."""
    start_DR = principal(gain_DD, rank)
    for sparse in sparsity:
        yield admm(gain_DD, start_DR, sparse) if sparse else start_DR


def admm(gain_DD: Tensor, start_DR: Tensor, sparse: float, *, iterations: int = 200, tolerance: float = 1e-4) -> Tensor:
    """Maximise tr(ΦᵀGΦ) - τ₂ Σ|φ| over orthonormal Φ by alternating directions, from `start`.

    Three copies of Φ are driven together: a free one (a linear solve), a sparse one (soft threshold) and an orthonormal
    one (polar factor). A channel that the sparse copy does not use at all is zero in the result.
    """
    width = len(gain_DD)
    inverse_DD = torch.linalg.inv(RHO * torch.eye(width).to(gain_DD) - gain_DD) / 2
    thin_DR = whole_DR = start_DR
    pull_thin, pull_whole = torch.zeros_like(start_DR), torch.zeros_like(start_DR)
    for _ in range(iterations):
        before_DR = whole_DR
        free_DR = inverse_DD @ (RHO * (thin_DR + whole_DR) - pull_thin - pull_whole)
        thin_DR = F.softshrink(free_DR + pull_thin / RHO, sparse / RHO)
        whole_DR = polar(free_DR + pull_whole / RHO)
        pull_thin, pull_whole = pull_thin + RHO * (free_DR - thin_DR), pull_whole + RHO * (free_DR - whole_DR)
        if max(float((each - whole_DR).abs().max()) for each in (before_DR, free_DR, thin_DR)) <= tolerance:
            break
    used_D = thin_DR.abs().sum(1) > 0
    return polar(whole_DR * used_D[:, None]) if int(used_D.sum()) >= start_DR.shape[1] else whole_DR


def polar(matrix_DR: Tensor) -> Tensor:
    """The orthonormal matrix nearest to this one; rows of zeros stay zero."""
    u_DR, _, v_RR = torch.linalg.svd(matrix_DR, full_matrices=False)
    return u_DR @ v_RR


def unexplained(given: Problem, rank: int, smooth: float, sparsity: Sequence[float]) -> list[float]:
    """‖Y(1 - ΦΦᵀ)‖² = tr S - tr(ΦᵀSΦ) for each τ₂, summed over parts, with Φ from the other parts."""
    losses = [0.0] * len(sparsity)
    for number, (tokens, held_DD) in enumerate(given.parts):
        others = [part for other, part in enumerate(given.parts) if other != number]
        total = sum(count for count, _ in others)
        train_DD = torch.stack([count / total * part_DD for count, part_DD in others]).sum(0)
        for which, phi_DR in enumerate(path(train_DD - smooth * given.roughness_DD, rank, sparsity)):
            losses[which] += tokens * float(held_DD.trace() - (phi_DR * (held_DD @ phi_DR)).sum())
    return losses


def cross_validated(given: Problem, rank: int) -> tuple[float, float]:
    """τ₁, then τ₂ at that τ₁, of the smallest unexplained variance in parts that were held out."""
    smooth = min(SMOOTHNESS, key=lambda smooth: unexplained(given, rank, smooth, [0.0])[0])
    sparsity = [each * len(given.moment_DD) ** -0.5 for each in SPARSITY]
    losses = unexplained(given, rank, smooth, sparsity)
    return smooth, sparsity[losses.index(min(losses))]
