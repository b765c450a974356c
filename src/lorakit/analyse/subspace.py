"""Directions that matrices share (Hu et al. 2021, section 7 and appendix G).

Legend: I in, O out, R rank, K width of a common space, M and N numbers of directions in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.exchange import Factored
from lorakit.errors import NotComparable

Pair = tuple[Tensor, Tensor]  # A (R, I) and B (O, R)


@dataclass(frozen=True, eq=False)
class Frames:
    """Orthonormal directions of ΔW = B A and of its factors: columns in float64, the strongest first.

    ΔW = left diag(values) rightᵀ. Each holds as many as its matrix has rank in float64: R in general, none where B is
    all zero, since the directions of what is zero mean nothing.
    """

    values_R: Tensor  # ΔW's singular values
    left_OR: Tensor
    right_IR: Tensor
    a_IR: Tensor  # the right singular directions of A, which the paper compares
    b_OR: Tensor  # the left singular directions of B

    @property
    def norm(self) -> float:
        """‖ΔW‖_F, with the scale that is in B."""
        return float(self.values_R.norm())


def directions(update: Factored | Pair) -> Frames:
    """The singular value decomposition of ΔW = B A and of its factors, from QR of the thin factors alone.

    With Aᵀ = Q P and B = Q' P', ΔW = Q' (P' Pᵀ) Qᵀ, so that the decomposition is one of a matrix (R, R).

    Raises:
        NotComparable: factors that do not fit each other, that are not finite, or of a rank above the matrix.

    >>> found = directions((torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0], [0.0], [0.0]])))
    >>> found.values_R.tolist(), found.left_OR.abs().T.tolist(), found.right_IR.abs().T.tolist()
    ([6.0], [[1.0, 0.0, 0.0]], [[0.0, 1.0]])
    """
    a_RI, b_OR = factors(update)
    input_IR, inner_RR = torch.linalg.qr(a_RI.T)
    output_OR, outer_RR = torch.linalg.qr(b_OR)
    width = max(a_RI.shape[1], len(b_OR))
    left_RR, values_R, right_RR = _svd(outer_RR @ inner_RR.T, width)
    a_RR, b_RR = _svd(inner_RR, width)[0], _svd(outer_RR, width)[0]
    return Frames(values_R, output_OR @ left_RR, input_IR @ right_RR, input_IR @ a_RR, output_OR @ b_RR)


def similarity(one_RK: Tensor, other_RK: Tensor, i: int, j: int) -> float:
    """φ = ‖V_iᵀ V'_j‖_F² / min(i, j), from 0 (nothing shared) to 1, of the top right singular directions of two.

    For independent random subspaces of a K-dimensional space its expectation is max(i, j) / K.

    Raises:
        NotComparable: more directions than a matrix has, matrices of different widths, or NaN.

    >>> similarity(torch.eye(2, 4), torch.eye(2, 4), 2, 2)
    1.0
    """
    return float(grid(top_right(one_RK, i), top_right(other_RK, j))[-1, -1])


def grid(one_KM: Tensor, other_KN: Tensor) -> Tensor:
    """φ (M, N) of the first i columns of one and the first j of the other, for all i and j at once (figures 3 and 4).

    The columns are orthonormal: fields of `Frames`, or of what `top` finds in a weight. φ = 1 - d² / min(i, j) with
    the projection metric d² = min(i, j) - Σ cos² of the principal angles (appendix G prints (1 - d²) / p, a slip).

    Raises:
        NotComparable: directions of spaces of different widths.

    >>> grid(torch.eye(4)[:, :2], torch.eye(4)[:, [1, 2]]).tolist()
    [[0.0, 0.0], [1.0, 0.5]]
    """
    if len(one_KM) != len(other_KN):
        raise NotComparable(
            f"directions of width {len(one_KM)} cannot be compared with those of width {len(other_KN)}; take updates "
            "of one role and of bases of one shape"
        )
    shared_MN = (one_KM.T @ other_KN).square().cumsum(0).cumsum(1)
    return shared_MN / torch.minimum(*_counts(shared_MN))


def similarities(one: Frames, other: Frames) -> dict[str, Tensor]:
    """φ of two updates of one matrix, by what is compared: A, B, and ΔW's own `left` and `right` directions.

    Raises:
        NotComparable: updates of matrices of different shapes.

    >>> eye = directions((torch.eye(2, 3), torch.eye(4, 2)))
    >>> {name: tuple(found.shape) for name, found in similarities(eye, eye).items()}
    {'A': (2, 2), 'B': (2, 2), 'left': (2, 2), 'right': (2, 2)}
    """
    return {
        "A": grid(one.a_IR, other.a_IR),
        "B": grid(one.b_OR, other.b_OR),
        "left": grid(one.left_OR, other.left_OR),
        "right": grid(one.right_IR, other.right_IR),
    }


def expected(i: int, j: int, width: int) -> float:
    """E φ = max(i, j) / width of independent, uniformly random subspaces of i and j dimensions; exact.

    Each of the i j squared inner products has the mean 1 / width.

    Raises:
        NotComparable: more dimensions than the space has.

    >>> expected(8, 64, 768)
    0.08333333333333333
    """
    for count in (i, j):
        refuse_above(count, width)
    return max(i, j) / width


def expected_grid(m: int, n: int, width: int) -> Tensor:
    """E φ (M, N) for all i up to m and j up to n.

    >>> expected_grid(2, 3, 4).tolist()
    [[0.25, 0.5, 0.75], [0.5, 0.5, 0.75]]
    """
    refuse_above(max(m, n), width)
    return torch.maximum(*_counts(torch.empty(m, n, dtype=torch.float64))) / width


def random_grid(width: int, m: int, n: int, seed: int = 0) -> Tensor:
    """φ (M, N) of two random Gaussian matrices (m, width) and (n, width): the third panel of figure 4.

    >>> random_grid(50, 2, 3).shape
    torch.Size([2, 3])
    """
    refuse_above(max(m, n), width)
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(count, width, generator=generator, dtype=torch.float64) for count in (m, n))
    return grid(top_right(one, m), top_right(other, n))


def top_right(matrix_RK: Tensor, count: int) -> Tensor:
    """The `count` strongest right singular directions of a matrix, as columns (K, count) in float64."""
    right_RK = torch.linalg.svd(finite(matrix_RK), full_matrices=False)[2]
    refuse_above(count, len(right_RK))
    return right_RK[:count].T


def factors(update: Factored | Pair) -> Pair:
    """A (R, I) and B (O, R) of an update in float64, checked.

    Raises:
        NotComparable: factors that do not fit each other, that are not finite, or of a rank above the matrix.
    """
    a_RI, b_OR = update.read() if isinstance(update, Factored) else update
    if a_RI.ndim != 2 or b_OR.ndim != 2 or len(a_RI) != b_OR.shape[1]:
        raise NotComparable(
            f"A {tuple(a_RI.shape)} and B {tuple(b_OR.shape)} are not the (R, in) and (out, R) of an update"
        )
    refuse_above(len(a_RI), min(a_RI.shape[1], len(b_OR)))
    return finite(a_RI), finite(b_OR)


def finite(matrix: Tensor) -> Tensor:
    """The matrix in float64.

    Raises:
        NotComparable: it holds NaN or infinity.
    """
    if not bool(matrix.isfinite().all()):
        raise NotComparable(f"a matrix {tuple(matrix.shape)} holds NaN or infinity, so it has no directions")
    return matrix.detach().double()


def refuse_above(count: int, there_are: int) -> None:
    """Say that there are not so many directions.

    Raises:
        NotComparable: `count` is none, or more than there are.
    """
    if not 1 <= count <= there_are:
        raise NotComparable(f"{count} directions are asked of a matrix that has {there_are}")


def _counts(like_MN: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers i (M, 1) and j (1, N) of the cells of a grid."""
    m, n = like_MN.shape
    return torch.arange(1, m + 1).to(like_MN)[:, None], torch.arange(1, n + 1).to(like_MN)[None]


def _svd(core_RR: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, s and V as columns, without what is zero but for rounding in a matrix of this width."""
    left_RR, values_R, right_RR = torch.linalg.svd(core_RR)
    count = int((values_R > values_R[0] * width * torch.finfo(values_R.dtype).eps).sum())
    return left_RR[:, :count], values_R[:count], right_RR[:count].T
