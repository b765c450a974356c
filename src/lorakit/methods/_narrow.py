"""What bottleneck adapters are made of: two projections with a non-linearity between them, and where they act.

Legend: I in, O out, N summands of a Kronecker sum (and stretches of a width), P = O / N, Q = I / N.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.layouts import layout_of
from lorakit.core.plan import Placement
from lorakit.errors import BadMethod
from lorakit.methods._targeted import refuse_slice

Activation = Literal["relu", "gelu", "silu"]
Start = Literal["truncated", "normal"]
ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
TRUNCATED, NORMAL, KRONECKER = 0.01, 0.02, 0.01  # standard deviations: of Houlsby et al., of BERT, of A in Compacter


class _Part(nn.Module, ABC):
    """A module with numbers that have a start of their own."""

    @abstractmethod
    def start(self) -> None:
        """Give the numbers their first values."""


def start_all(modules: Iterable[nn.Module]) -> None:
    """Start every part below some modules once, however many of them share it."""
    for part in {id(part): part for module in modules for part in module.modules()}.values():
        if isinstance(part, _Part):
            part.start()


class DenseProjection(_Part):
    """W x + b with W (O, I)."""

    def __init__(self, width_in: int, width_out: int, start: Start) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width_out, width_in))
        self.bias = nn.Parameter(torch.zeros(width_out))
        self._start = start

    def start(self) -> None:
        """Near zero, so that the adapter is near the identity; the bias stays zero."""
        if self._start == "truncated":
            nn.init.trunc_normal_(self.weight, std=TRUNCATED, a=-2 * TRUNCATED, b=2 * TRUNCATED)
        else:
            nn.init.normal_(self.weight, std=NORMAL)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class SharedFactors(_Part):
    """A (N, N, N): the left factors of every Kronecker sum of one adapter."""

    def __init__(self, summands: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(summands, summands, summands))

    def start(self) -> None:
        """Small, and so is every sum that it is part of."""
        nn.init.normal_(self.A, std=KRONECKER)


class KroneckerProjection(_Part):
    """W x + b with W = sum over i of A_i ⊗ s_i t_iᵀ, and A shared; W is never formed.

    Row (a, p) of W x is sum_i s_ip sum_j A_iaj sum_q t_iq x_jq: three thin products.
    """

    def __init__(self, width_in: int, width_out: int, shared: SharedFactors) -> None:
        super().__init__()
        summands = len(shared.A)
        self.shared = shared
        self.s = nn.Parameter(torch.zeros(summands, width_out // summands))
        self.t = nn.Parameter(torch.zeros(summands, width_in // summands))
        self.bias = nn.Parameter(torch.zeros(width_out))

    def start(self) -> None:
        """Each s_i and t_i as a matrix of one column by Glorot and Bengio, with the gain of the authors' code."""
        for factor in (self.s, self.t):
            bound = math.sqrt(2) * math.sqrt(6 / (1 + factor.shape[1]))
            nn.init.uniform_(factor, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        s_NP, t_NQ = self.s.to(x.dtype), self.t.to(x.dtype)
        a_NNN = self.shared.A.to(x.device, x.dtype)  # blocks may be on several devices
        low = x.unflatten(-1, t_NQ.shape) @ t_NQ.mT
        mixed = torch.einsum("...ji,iaj->...ai", low, a_NNN)
        return (mixed @ s_NP).flatten(-2) + self.bias.to(x.dtype)


def kronecker(
    width: int, size: int, shared: SharedFactors, path: str
) -> tuple[KroneckerProjection, KroneckerProjection]:
    """Down- and up-projection as Kronecker sums.

    Raises:
        BadMethod: the number of summands does not divide both widths.
    """
    summands = len(shared.A)
    if width % summands or size % summands:
        both = math.gcd(width, size)
        fits = ", ".join(str(number) for number in range(1, both + 1) if both % number == 0)
        raise BadMethod(f"a Kronecker sum of {summands} has to divide the width {width} of {path} and the size {size}; "
                        f"take kronecker out of {fits}, or another size")  # fmt: skip
    return KroneckerProjection(width, size, shared), KroneckerProjection(size, width, shared)


class CommonParts(nn.Module):
    """What the deltas of one adapter are built from: the width of each place, and A of Kronecker sums."""

    def __init__(self, widths: Mapping[str, int], summands: int) -> None:
        super().__init__()
        self.widths = dict(widths)
        self.factors = SharedFactors(summands) if summands else None


@dataclass(frozen=True)
class BottleneckParts:
    """What one bottleneck consists of; the norm may be missing."""

    down: nn.Module
    up: nn.Module
    norm: nn.LayerNorm | None
    activation: Activation


class NarrowDelta(Delta):
    """f(y) = up(activation(down(norm(y)))) at one place; where it is left out, it does no arithmetic at all."""

    unmergeable = "is a non-linear function of the layer's output, which no weight can hold"

    def __init__(
        self, placement: Placement, module: nn.Module, parts: BottleneckParts, *, drop: int, drop_most: int
    ) -> None:
        refuse_slice(placement)
        super().__init__(placement, layout_of(module))
        self.norm, self.down, self.up = parts.norm, parts.down, parts.up
        self.activation = parts.activation
        self.depth = depth_of(placement.path)
        self.rests_in_training = False
        self.rests_in_inference = self.depth < drop
        self._may_rest = self.depth < max(drop, drop_most)

    @property
    def may_rest(self) -> bool:
        """Whether it is among the lower blocks, which are left out at times."""
        return self._may_rest

    @property
    def rests(self) -> bool:
        """Whether it is left out now."""
        return self.rests_in_training if self.training else self.rests_in_inference

    def change(self, y: Tensor) -> Tensor:
        """f(y); parameters are cast to y's dtype."""
        if self.norm is not None:
            weight, bias = self.norm.weight.to(y.dtype), self.norm.bias.to(y.dtype)
            y = F.layer_norm(y, self.norm.normalized_shape, weight, bias, self.norm.eps)
        return cast(Tensor, self.up(ACTIVATIONS[self.activation](self.down(y))))


class AfterSite(NarrowDelta):
    """y + f(y)."""

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y if self.rests else y + self.change(y).to(y.dtype)


class AroundNorm(NarrowDelta):
    """LN(x + f(LN(x))): the base's own norm, used twice."""

    def __init__(
        self, placement: Placement, module: nn.Module, parts: BottleneckParts, *, drop: int, drop_most: int
    ) -> None:
        super().__init__(placement, module, parts, drop=drop, drop_most=drop_most)
        self.base = [module]  # in a list: not a child of ours

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        norm = self.base[0]
        return y if self.rests else cast(Tensor, type(norm).forward(norm, x + self.change(y).to(x.dtype)))


def depth_of(path: str) -> int:
    """The number of the block that a path lies in: the first number among its names.

    >>> depth_of("bert.encoder.layer.3.output.LayerNorm")
    3
    """
    return next((int(name) for name in path.split(".") if name.isdigit()), 0)
