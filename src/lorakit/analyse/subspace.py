"""Directions that matrices share, and what an update does with those of its weight (Hu et al. 2021, section 7).

Legend: I in, O out, R rank, K width of a common space.
"""

from __future__ import annotations

import torch
from torch import Tensor


def similarity(one_RK: Tensor, other_RK: Tensor, i: int, j: int) -> float:
    """φ = ‖V_iᵀ V'_j‖_F² / min(i, j), from 0 (nothing shared) to 1, of the top right singular directions of two.

    For independent random subspaces of a K-dimensional space its expectation is max(i, j) / K.

    Raises:
        ValueError: more directions than a matrix has.

    >>> similarity(torch.eye(2, 4), torch.eye(2, 4), 2, 2)
    1.0
    """
    directions_KI, directions_KJ = _top_right(one_RK, i), _top_right(other_RK, j)
    return float((directions_KI.T @ directions_KJ).square().sum() / min(i, j))


def projected(weight_OI: Tensor, other_OI: Tensor, rank: int) -> float:
    """‖Uᵀ W V‖_F, with U and V the top left and right singular directions of another: W's part in them.

    With W's own directions it is the root of the sum of its `rank` largest squared singular values; with random ones
    about ‖W‖_F rank / sqrt(out in).

    >>> projected(torch.diag(torch.tensor([3.0, 4.0])), torch.eye(2), 2)
    5.0
    """
    left_OR, _, right_RI = torch.linalg.svd(other_OI.double(), full_matrices=False)
    _refuse_above(rank, len(right_RI))
    return float((left_OR[:, :rank].T @ weight_OI.double() @ right_RI[:rank].T).norm())


def amplification(weight_OI: Tensor, delta_OI: Tensor, rank: int) -> float:
    """How much ΔW strengthens directions that W already has: ‖ΔW‖_F / ‖Uᵀ W V‖_F (Hu et al. 2021, section 7.3)."""
    return float(delta_OI.double().norm()) / projected(weight_OI, delta_OI, rank)


def _top_right(matrix_RK: Tensor, count: int) -> Tensor:
    right_RK = torch.linalg.svd(matrix_RK.double(), full_matrices=False)[2]
    _refuse_above(count, len(right_RK))
    return right_RK[:count].T


def _refuse_above(count: int, there_are: int) -> None:
    if not 1 <= count <= there_are:
        raise ValueError(f"{count} directions are asked of a matrix that has {there_are}")
