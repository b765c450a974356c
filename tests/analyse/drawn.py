"""Random matrices and updates for the tests of the analyses."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.exchange import Factored


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A Gaussian matrix."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    """A matrix of these singular values and random directions."""
    left, right = (torch.linalg.qr(drawn(side, len(values), seed + n))[0] for n, side in enumerate((rows, columns)))
    return left * values.double() @ right.T


def update_of(a_RI: Tensor, b_OR: Tensor, layer: int | None = 0, role: str = "attn.q", mark: str = "") -> Factored:
    """One matrix of an adapter."""
    path = f"layers.{layer}.{role}"
    return Factored(f"{path}{mark}", path, role, layer, len(a_RI), (len(b_OR), a_RI.shape[1]), lambda: (a_RI, b_OR))
