"""What the initialisations share: a usable matrix, singular vectors with fixed signs, and factors on the CPU.

Legend: I in, O out, R rank, K the smaller side, D the side of a square matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.errors import BadMethod


def usable(weight_OI: Tensor, rank: int) -> Tensor:
    """W as float32, where it is.

    Raises:
        BadMethod: W has no values here, is not finite, or has fewer than `rank` directions.
    """
    if weight_OI.is_meta:
        raise BadMethod("the weight has no values (it is on the meta device); load the model's weights first")
    if rank > min(weight_OI.shape):
        raise BadMethod(f"rank {rank} is above the smaller side of the matrix {tuple(weight_OI.shape)}; lower it")
    w_OI = weight_OI.detach().float()
    if not bool(w_OI.isfinite().all()):
        raise BadMethod("the weight holds NaN or infinity; load another checkpoint, or leave the layer out")
    return w_OI


def precise(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device` as float64 (float32 where the device has none): moments are squares, which need the digits."""
    return x.to(device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, s and Vᵀ; each left vector's largest entry is positive, so that every machine finds the same signs.

    >>> u, s, vh = svd(torch.diag(torch.tensor([-3.0, 2.0])))
    >>> u.diag().tolist(), s.tolist(), vh.diag().tolist()
    ([1.0, 1.0], [3.0, 2.0], [-1.0, 1.0])
    """
    u_OK, s_K, v_KI = torch.linalg.svd(matrix, full_matrices=False)
    signs_K = _signs(u_OK)
    return u_OK * signs_K, s_K, v_KI * signs_K[:, None]


def principal(symmetric_DD: Tensor, rank: int) -> Tensor:
    """The `rank` orthonormal eigenvectors of the largest eigenvalues, as columns, the largest first.

    Raises:
        BadMethod: there are not so many.
    """
    if rank > len(symmetric_DD):
        raise BadMethod(f"rank {rank} is above the layer's width {len(symmetric_DD)} on that side; take a smaller rank")
    vectors_DR = torch.linalg.eigh(symmetric_DD)[1].flip(1)[:, :rank]
    return vectors_DR * _signs(vectors_DR)


def _signs(columns: Tensor) -> Tensor:
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(columns)


def damped(moment_DD: Tensor, share: float) -> Tensor:
    """S + share · mean(diag S) · 1, which can be inverted however few vectors S comes from.

    Raises:
        BadMethod: S is zero.
    """
    level = moment_DD.diagonal().mean()
    if not bool(level > 0):
        raise BadMethod("what the layer sees in the calibration data is zero everywhere; calibrate on other data")
    return moment_DD + share * level * torch.eye(len(moment_DD), dtype=moment_DD.dtype, device=moment_DD.device)


def halves(left_OR: Tensor, s_R: Tensor, right_RI: Tensor) -> tuple[Tensor, Tensor]:
    """A = √s · right and B = left · √s."""
    root_R = s_R.sqrt()
    return finished(root_R[:, None] * right_RI, left_OR * root_R)


def finished(a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
    """A and B as plain float32 tensors on the CPU."""
    return a_RI.float().cpu().contiguous(), b_OR.float().cpu().contiguous()
