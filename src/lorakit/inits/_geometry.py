"""Geometries of a layer's channels: what it means that a direction is smooth over them.

A geometry makes a roughness matrix Ω (positive semi-definite): φᵀΩφ is small where φ is smooth. Hidden channels have no
order of their own, so a geometry is a choice: their index, heads by channels, or how they correlate.

Legend: D channels, P places, G gaps between places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorakit.errors import BadMethod

Geometry = Callable[[Tensor], Tensor]  # the covariance (D, D) of the channels -> Ω (D, D)


def spline(places_P: Tensor) -> Tensor:
    """Ω of the cubic smoothing spline through rising places: φᵀΩφ = ∫ f''² for the natural spline f with f(place) = φ.

    Ω = Qᵀ R⁻¹ Q with Q (P-2, P) of second differences and R tridiagonal (Green and Silverman 1994); straight lines
    have no roughness.

    >>> line_P = torch.arange(5).double()
    >>> omega_PP = spline(line_P)
    >>> bool((omega_PP @ line_P).abs().max() < 1e-9), round(float(omega_PP[0, 0]), 4)
    (True, 1.6071)
    """
    if len(places_P) < 3:
        return places_P.new_zeros(len(places_P), len(places_P))
    gaps_G = places_P.diff()
    rows = torch.arange(len(gaps_G) - 1)
    q = places_P.new_zeros(len(rows), len(places_P))
    q[rows, rows], q[rows, rows + 2] = 1 / gaps_G[:-1], 1 / gaps_G[1:]
    q[rows, rows + 1] = -1 / gaps_G[:-1] - 1 / gaps_G[1:]
    beside = gaps_G[1:-1] / 6
    r = torch.diag((gaps_G[:-1] + gaps_G[1:]) / 3) + torch.diag(beside, 1) + torch.diag(beside, -1)
    return q.T @ torch.linalg.solve(r, q)


def line(covariance_DD: Tensor) -> Tensor:
    """Channels stand on a line in the order of their index."""
    return spline(torch.arange(len(covariance_DD)).to(covariance_DD))


def grid(heads: int) -> Geometry:
    """Channels stand on a grid, heads by channels of a head; smooth along both.

    >>> grid(2)(torch.eye(8)).shape
    torch.Size([8, 8])
    """

    def roughness(covariance_DD: Tensor) -> Tensor:
        width = len(covariance_DD)
        if width % heads:
            raise BadMethod(f"{width} channels do not divide among {heads} heads; give the layer's number of heads")
        across, along = (torch.arange(size).to(covariance_DD) for size in (heads, width // heads))
        ones = torch.eye(heads).to(covariance_DD), torch.eye(width // heads).to(covariance_DD)
        return torch.kron(spline(across), ones[1]) + torch.kron(ones[0], spline(along))

    return roughness


def graph(covariance_DD: Tensor) -> Tensor:
    """Channels are nodes of a graph whose edges weigh |correlation|: its Laplacian.

    >>> graph(torch.tensor([[4.0, -1.0], [-1.0, 1.0]])).tolist()
    [[0.5, -0.5], [-0.5, 0.5]]
    """
    deviations_D = covariance_DD.diagonal().clamp(min=0).sqrt()
    scale_D = torch.where(deviations_D > 0, 1 / deviations_D, 0.0)
    weights_DD = (covariance_DD * scale_D[:, None] * scale_D).abs().fill_diagonal_(0.0)
    return torch.diag(weights_DD.sum(1)) - weights_DD


def seriation(covariance_DD: Tensor) -> Tensor:
    """Channels stand on a line in the order in which they correlate (that of the graph's Fiedler vector)."""
    order_D = torch.linalg.eigh(graph(covariance_DD))[1][:, 1].argsort()
    rank_D = order_D.argsort()
    return line(covariance_DD)[rank_D][:, rank_D]
