"""LoKr: a Kronecker product as the update (Yeh et al. 2023, arXiv:2309.14859; after Hyeon-Woo et al. 2021).

Legend: B batch, T tokens, I = J N in, O = L K out, R rank.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lorakit.core import patterns
from lorakit.core.delta import Delta
from lorakit.core.layouts import Conv1DLayout, Layout, layout_of
from lorakit.core.method import Rules, Tensors
from lorakit.core.named import named_tensors, read_named
from lorakit.core.plan import Placement, Plan
from lorakit.core.sites import Site
from lorakit.errors import BadAdapterFile, BadMethod
from lorakit.methods import _peft as peft
from lorakit.methods._linear import linear_layout, linear_sites, out_features
from lorakit.methods._targeted import Targeted, whole

log = logging.getLogger("lorakit")
KIND, PREFIX, NEAREST = "kronecker", "lokr_", -1
NOT_PEFT = "LORAKIT_LOKR"  # PEFT has no LoKr of slices or of Conv1D layers, and refuses this name
READ = {
    "r": int | None,
    "alpha": float | None,
    "decompose_both": bool | None,
    "decompose_factor": int | None,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "rank_dropout": float | None,
    "module_dropout": float | None,
}


@dataclass(frozen=True, kw_only=True)
class LoKr(Targeted):
    """h = W0 x + (alpha / R) (w1 ⊗ w2) x, with w1 (L, J) zero and w2 (K, N) random at the start.

    out = L K and in = J N. w2 is a product of rank R, w2_a (K, R) w2_b (R, N), where R is less than half of its longer
    side, and so is w1 with `decompose_both`. `factor` sets L and J, otherwise each is the divisor nearest to the square
    root from below.

    Example:
        >>> LoKr(rank=4, factor=8, targets=("attn.q", "attn.v")).factor
        8

    Paper: Yeh et al. 2023, https://arxiv.org/abs/2309.14859; its form with a rank: Hyeon-Woo et al. 2021,
    https://arxiv.org/abs/2108.06098.
    """

    name: ClassVar[str] = "lokr"
    kinds: ClassVar[tuple[str, ...]] = (KIND,)
    peft_type: ClassVar[str] = "LOKR"

    rank: int = 8  # R; of w2, and of w1 with decompose_both
    alpha: float = 16.0  # the update is scaled by alpha / rank
    factor: int = NEAREST  # rows and columns of w1; -1: near the square root of the layer's
    decompose_both: bool = False  # factor w1, too

    def _rules(self) -> Rules:
        yield from super()._rules()
        yield whole("rank", self.rank)
        yield "factor", self.factor, "a whole number of at least 1, or -1", self.factor == NEAREST or self.factor >= 1

    def sites(self, model: nn.Module) -> list[Site]:
        """The targets' linear layers."""
        return linear_sites(self.name, model, self.targets)

    def places(self, model: nn.Module, statistics: Mapping[Any, Any] | None) -> Sequence[Placement]:
        """One Kronecker product a site."""
        how = self.rank, self.alpha, self.alpha / self.rank
        return [Placement(site.path, site.role, KIND, site.slice, *how) for site in self.sites(model)]

    def check(self, plan: Plan, model: nn.Module) -> None:
        """Refuse a factor that does not divide a matrix."""
        for placement in plan:
            layout = layout_of(model.get_submodule(placement.path))
            if placement.kind != KIND or layout is None or self.factor == NEAREST:
                continue
            out, inner = out_features(placement, layout), layout.in_features
            if out % self.factor or inner % self.factor:
                raise BadMethod(
                    f"factor {self.factor} does not divide the matrix of {placement.path} ({out} x {inner}); take a "
                    f"divisor of {math.gcd(out, inner)}, or -1 for the nearest to a square"
                )

    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> Kronecker:
        """Room for w1 and w2, or their factors."""
        sizes = Sizes.of(placement, linear_layout(placement, module), self.factor, both=self.decompose_both)
        return Kronecker(placement, linear_layout(placement, module), sizes)

    def start(self, deltas: Sequence[Delta], model: nn.Module, statistics: Mapping[Any, Any] | None) -> None:
        """w1 (or its left factor) is zero, all else random."""
        for delta in deltas:
            if isinstance(delta, Kronecker):
                delta.start()

    def to_peft(self, deltas: Sequence[Delta]) -> tuple[dict[str, Any], Tensors]:
        """PEFT's fields and tensors, where PEFT can have these layers; otherwise lorakit's own names."""
        if not _fits_peft(deltas):
            return {"peft_type": NOT_PEFT}, named_tensors(deltas)
        places = {delta.placement.path: delta.placement for delta in deltas}
        config = {
            "r": self.rank,
            "alpha": patterns.plain(self.alpha),
            "target_modules": list(places),
            "rank_pattern": {re.escape(path): p.rank for path, p in places.items() if p.rank != self.rank},
            "alpha_pattern": {
                re.escape(path): patterns.plain(p.alpha) for path, p in places.items() if p.alpha != self.alpha
            },
            "decompose_both": self.decompose_both,
            "decompose_factor": self.factor,
            "init_weights": True,
        }
        named = {f"{delta.placement.path}.{PREFIX}{key}": p for delta in deltas for key, p in delta.named_parameters()}
        return config, {key: p.detach() for key, p in named.items()}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Tensors, model: nn.Module) -> tuple[Self, Plan]:
        """The method of a PEFT folder; ranks come from the factors, where there are any."""
        peft.refuse_misfits(config, READ, patterns.pattern_faults(config) if isinstance(config, dict) else ())
        dropped = [key for key in ("rank_dropout", "module_dropout") if config.get(key)]
        if dropped:
            log.warning("the adapter was trained with %s, which lorakit's lokr lacks", " and ".join(dropped))
        ranks = {path: _rank(path, config, tensors) for path in _paths(tensors)}
        faults: list[str] = []
        alphas = {path: patterns.alpha_of(config, path, rank, faults, "alpha") for path, rank in ranks.items()}
        if faults:
            raise BadAdapterFile("the PEFT adapter", faults)
        method = cls(
            rank=patterns.commonest(ranks.values(), 8),
            alpha=float(patterns.commonest(alphas.values(), 8.0)),
            targets=peft.targets(config.get("target_modules"), set(ranks), model),
            factor=config.get("decompose_factor") or NEAREST,
            decompose_both=bool(config.get("decompose_both")),
            train=peft.trained(config, tensors),
        )
        return method, tuple(_as_told(placement, ranks, alphas) for placement in method.plan(model))

    def read(self, deltas: Sequence[Delta], tensors: Tensors) -> list[str]:
        """Copy the factors out of `tensors`."""
        if not _fits_peft(deltas):
            return read_named(deltas, tensors)
        faults: list[str] = []
        for delta in deltas:
            own = {f"{delta.placement.path}.{PREFIX}{key}": p for key, p in delta.named_parameters()}
            found, wrong = peft.taken({key: tuple(p.shape) for key, p in own.items()}, tensors)
            faults += wrong
            with torch.no_grad():
                for key, value in found.items():
                    own[key].copy_(value)
        return faults


@dataclass(frozen=True)
class Sizes:
    """Sides of w1 (L, J) and w2 (K, N), and which of them are products of a rank."""

    L: int
    K: int
    J: int
    N: int
    splits_w1: bool
    splits_w2: bool

    @staticmethod
    def of(placement: Placement, layout: Layout, factor: int, *, both: bool) -> Sizes:
        """The sizes that PEFT gives a layer."""
        if placement.rank < 1:  # a file may tell anything
            raise BadMethod(f"{placement.path} has the rank {placement.rank}; it needs at least 1")
        (L, K), (J, N) = factorised(out_features(placement, layout), factor), factorised(layout.in_features, factor)
        return Sizes(L, K, J, N, both and 2 * placement.rank < max(L, J), 2 * placement.rank < max(K, N))


def factorised(size: int, factor: int) -> tuple[int, int]:
    """`size` as a product of two numbers, the first of them `factor` where that divides it.

    Otherwise (and for -1) the first is the largest divisor that is not above the square root, nor above `factor`.

    >>> factorised(768, -1), factorised(768, 8), factorised(127, -1), factorised(12, 5)
    ((24, 32), (8, 96), (1, 127), (3, 4))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == NEAREST else min(factor, math.isqrt(size))
    first = next((divisor for divisor in range(most, 0, -1) if size % divisor == 0), 1)
    return first, size // first


class Kronecker(Delta):
    """s (w1 ⊗ w2) of one site, each of them whole or a product of rank R."""

    layout: Layout

    def __init__(self, placement: Placement, layout: Layout, sizes: Sizes) -> None:
        super().__init__(placement, layout)
        self.sizes, self.scale = sizes, placement.scale
        self._room("w1", sizes.L, sizes.J, split=sizes.splits_w1)
        self._room("w2", sizes.K, sizes.N, split=sizes.splits_w2)

    def _room(self, name: str, rows: int, columns: int, *, split: bool) -> None:
        rank = self.placement.rank
        shapes = {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)} if split else {name: (rows, columns)}
        for key, shape in shapes.items():
            self.register_parameter(key, nn.Parameter(torch.zeros(shape)))

    @torch.no_grad()
    def start(self) -> None:
        """Uniform on ±1/√columns, but w1 or its left factor zero."""
        for key, value in self.named_parameters():
            if key not in ("w1", "w1_a"):
                bound = 1 / math.sqrt(value.shape[1])
                value.copy_(torch.empty(value.shape).uniform_(-bound, bound))

    def scaled_w1(self) -> Tensor:
        """s w1 (L, J)."""
        return self._whole("w1", split=self.sizes.splits_w1) * self.scale

    def _whole(self, name: str, *, split: bool) -> Tensor:
        if not split:
            return self.get_parameter(name)
        return self.get_parameter(f"{name}_a") @ self.get_parameter(f"{name}_b")

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s w1 X w2ᵀ, where X (J, N) is x and the result (L, K) is laid out as y; w1 ⊗ w2 is never formed."""
        part_BTJN = x.unflatten(-1, (self.sizes.J, self.sizes.N))
        outer = "w2"
        if self.sizes.splits_w2:
            part_BTJN, outer = _product(part_BTJN, self.get_parameter("w2_b").to(y.dtype)), "w2_a"
        part_BTLN = _product(part_BTJN.mT, self.scaled_w1().to(y.dtype)).mT
        return y + _product(part_BTLN, self.get_parameter(outer).to(y.dtype)).flatten(-2).to(y.dtype)

    def fold(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s w1 ⊗ w2."""
        w2_KN = self._whole("w2", split=self.sizes.splits_w2)
        return weight_OI + torch.kron(self.scaled_w1(), w2_KN).to(weight_OI), bias_O


def _product(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x Wᵀ over the last dimension, as one plain product of matrices whether gradients are wanted or not."""
    return (x.reshape(-1, x.shape[-1]) @ weight_OI.T).unflatten(0, x.shape[:-1])


def _fits_peft(deltas: Sequence[Delta]) -> bool:
    whole_layers = all(delta.placement.slice is None for delta in deltas)
    return whole_layers and not any(isinstance(delta.layout, Conv1DLayout) for delta in deltas)


def _paths(tensors: Tensors) -> list[str]:
    endings = tuple(f".{PREFIX}{name}" for name in ("w2", "w2_b"))
    paths = sorted(key.rpartition(".")[0] for key in tensors if key.endswith(endings))
    if not paths:
        raise BadAdapterFile("the PEFT adapter", ["it has no LoKr tensors"])
    return paths


def _rank(path: str, config: Mapping[str, Any], tensors: Tensors) -> int:
    factors = (tensors.get(f"{path}.{PREFIX}{name}") for name in ("w2_b", "w1_b"))
    found = next((value.shape[0] for value in factors if value is not None and value.dim()), None)
    return max(int(found or patterns.rank_of(config, path) or 8), 1)


def _as_told(placement: Placement, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> Placement:
    if placement.kind != KIND:
        return placement
    rank, alpha = ranks[placement.path], alphas[placement.path]
    return replace(placement, rank=rank, alpha=alpha, scale=alpha / rank)
