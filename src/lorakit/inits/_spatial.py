"""Smooth and sparse principal components (SpatPCA: Wang and Huang 2017, arXiv:1501.03221).

Φ minimises -tr(Φᵀ S Φ) + τ₁ tr(Φᵀ Ω Φ) + τ₂ Σ|φ| subject to ΦᵀΦ = 1, for a second moment S of centred data and a
roughness Ω. Here S has the largest eigenvalue 1 and Ω the mean diagonal 1, so that τ₁ and τ₂ mean the same everywhere.

Legend: D channels, R components.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lorakit.core.statistics import Moment, merged
from lorakit.errors import BadMethod
from lorakit.inits._matrix import precise, principal

SMOOTHNESS: Final = (0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # τ₁ that are tried
SPARSITY: Final = (0.0, 0.01, 0.03, 0.1, 0.3)  # τ₂ that are tried, times 1/√D
RHO: Final = 10.0  # ADMM's penalty, for S of largest eigenvalue 1


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
    """Φ (D, R), orthonormal: eigenvectors of S - τ₁Ω where τ₂ = 0 (which is exact), else by ADMM from there.

    >>> moment_DD = torch.diag(torch.tensor([3.0, 1.0, 2.0]).double())
    >>> components(moment_DD, torch.zeros(3, 3), 1, smooth=0.0, sparse=0.0).T.tolist()
    [[1.0, 0.0, 0.0]]
    """
    start_DR = principal(moment_DD - smooth * roughness_DD, rank)
    return admm(moment_DD - smooth * roughness_DD, start_DR, sparse) if sparse else start_DR


def admm(gain_DD: Tensor, start_DR: Tensor, sparse: float, *, iterations: int = 500, tolerance: float = 1e-5) -> Tensor:
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
        thin_DR = torch.nn.functional.softshrink(free_DR + pull_thin / RHO, sparse / RHO)
        whole_DR = polar(free_DR + pull_whole / RHO)
        pull_thin, pull_whole = pull_thin + RHO * (free_DR - thin_DR), pull_whole + RHO * (free_DR - whole_DR)
        moved = max(float((each - whole_DR).abs().max()) for each in (before_DR, free_DR, thin_DR))
        if moved <= tolerance:
            break
    used_D = thin_DR.abs().sum(1) > 0
    return polar(whole_DR * used_D[:, None]) if int(used_D.sum()) >= start_DR.shape[1] else whole_DR


def polar(matrix_DR: Tensor) -> Tensor:
    """The orthonormal matrix nearest to this one; rows of zeros stay zero."""
    u_DR, _, v_RR = torch.linalg.svd(matrix_DR, full_matrices=False)
    return u_DR @ v_RR


def unexplained(given: Problem, rank: int, smooth: float, sparse: float) -> float:
    """‖Y(1 - ΦΦᵀ)‖² summed over parts, with Φ from the other parts: tr S - tr(ΦᵀSΦ) needs no data but S."""
    loss = 0.0
    for number, (tokens, held_DD) in enumerate(given.parts):
        others = [part for other, part in enumerate(given.parts) if other != number]
        total = sum(count for count, _ in others)
        train_DD = torch.stack([count / total * part_DD for count, part_DD in others]).sum(0)
        phi_DR = components(train_DD, given.roughness_DD, rank, smooth, sparse)
        loss += tokens * float(held_DD.trace() - (phi_DR * (held_DD @ phi_DR)).sum())
    return loss


def cross_validated(
    given: Problem, rank: int, smoothness: Iterable[float] = SMOOTHNESS, sparsity: Iterable[float] = SPARSITY
) -> tuple[float, float]:
    """τ₁, then τ₂ at that τ₁, of the smallest unexplained variance in parts that were held out."""
    smooth = min(smoothness, key=lambda smooth: unexplained(given, rank, smooth, 0.0))
    scale = len(given.moment_DD) ** -0.5
    return smooth, min((each * scale for each in sparsity), key=lambda each: unexplained(given, rank, smooth, each))
