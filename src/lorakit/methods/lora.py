"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv:2106.09685).

Legend: B batch, T tokens, I in, O out, R rank, N adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core import registry
from lorakit.core.delta import Delta
from lorakit.core.layouts import Layout, LinearLayout, layout_of
from lorakit.core.method import Method, Tensors
from lorakit.core.plan import LOW_RANK, Placement, Plan
from lorakit.core.replace import BiasMode, bias_placements, module_placements
from lorakit.core.sites import GROUPS, Site, matching, resolve
from lorakit.errors import BadMethod, NoSuchTarget, nearest
from lorakit.methods import _lora_peft as peft_format

Scaling = Literal["alpha/r", "alpha/sqrt(r)"]


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """h = W0 x + (alpha / r) B A x, with A (r, in) random, B (out, r) zero and W0 (out, in) frozen.

    `ranks` and `alphas` give single targets a rank or alpha of their own: keys are roles, groups or globs, and the most
    specific one wins. `train` names modules (a task's head) that are trained whole and saved with the adapter.

    Example:
        >>> LoRA(rank=8, alpha=16, targets=("attn.q", "attn.v"), ranks={"attn.q": 4}).rank
        8

    Paper: Hu et al. 2021, https://arxiv.org/abs/2106.09685; scaling by alpha / sqrt(r): Kalajdzievski 2023,
    https://arxiv.org/abs/2312.03732.
    """

    name: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"

    rank: int = 8  # R; rows of A, columns of B
    alpha: float = 16.0  # the update is scaled by alpha / rank
    targets: tuple[str, ...] | str = ("attn.q", "attn.v")  # roles, groups, globs; commas separate them in a text
    ranks: Mapping[str, int] = field(default_factory=dict)  # rank of single targets
    alphas: Mapping[str, float] = field(default_factory=dict)  # alpha of single targets
    init: str = "kaiming"  # a file of inits/: gaussian (the paper's), kaiming (loralib's)
    scaling: Scaling = "alpha/r"  # or alpha/sqrt(r)
    dropout: float = 0.0  # on the branch's input only
    bias: BiasMode = "none"  # train biases too: of the adapted layers (lora_only) or all
    train: tuple[str, ...] | str = ()  # modules trained whole, e.g. classifier

    def __post_init__(self) -> None:
        for name in ("targets", "train"):
            value = getattr(self, name)
            split = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
            object.__setattr__(self, name, tuple(part for part in split if part))
        faults = [f"{name}={value!r} must be {wanted}" for name, value, wanted, ok in self._rules() if not ok]
        if faults:
            raise BadMethod(f"LoRA cannot be built so: {'; '.join(faults)}")
        registry.find("lorakit.inits", self.init)

    def _rules(self) -> Iterator[tuple[str, object, str, bool]]:
        for rank in (self.rank, *self.ranks.values()):
            yield "rank", rank, "a whole number of at least 1", isinstance(rank, int) and rank >= 1
        for alpha in (self.alpha, *self.alphas.values()):
            yield "alpha", alpha, "a finite number", isinstance(alpha, int | float) and math.isfinite(alpha)
        yield "dropout", self.dropout, "at least 0 and below 1", 0 <= self.dropout < 1
        yield "scaling", self.scaling, f"one of {get_args(Scaling)}", self.scaling in get_args(Scaling)
        yield "bias", self.bias, f"one of {get_args(BiasMode)}", self.bias in get_args(BiasMode)
        something = bool(self.targets or self.train or self.bias == "all")
        yield "targets", self.targets, "roles, groups or globs, at least one", something

    def plan(self, model: nn.Module) -> Plan:
        """One low-rank placement a site, then biases, then modules trained whole."""
        sites = self._sites(model)
        ranks, alphas = _per_site(model, sites, self.ranks), _per_site(model, sites, self.alphas)
        low = [
            self._placement(site, int(rank or self.rank), self.alpha if alpha is None else float(alpha))
            for site, rank, alpha in zip(sites, ranks, alphas, strict=True)
        ]
        whole = module_placements(model, self.train)
        paths = {placement.path for placement in whole}
        both = paths & {placement.path for placement in low}
        if both:
            raise BadMethod(f"{min(both)} is adapted and trained whole at once; take it out of targets or train")
        biases = bias_placements(model, self.bias, (placement.path for placement in low))
        return (*low, *(placement for placement in biases if placement.path not in paths), *whole)

    def _sites(self, model: nn.Module) -> list[Site]:
        sites = resolve(model, self.targets)
        usable = [site for site in sites if site.layout is not None]
        for target in self.targets:
            if not any(site.layout for site in matching(sites, target, model)):
                kinds = {type(model.get_submodule(s.path)).__name__ for s in matching(sites, target, model)}
                raise BadMethod(
                    f"LoRA needs Linear, Conv1D, Embedding or ungrouped Conv2d layers, but {target!r} names "
                    f"{', '.join(sorted(kinds))}"
                )
        return usable

    def _placement(self, site: Site, rank: int, alpha: float) -> Placement:
        scale = alpha / (rank if self.scaling == "alpha/r" else math.sqrt(rank))
        return Placement(site.path, site.role, LOW_RANK, site.slice, rank, alpha, scale, self.init)

    def check(self, plan: Plan, model: nn.Module) -> None:
        """Refuse a rank above the matrix it adapts: it would add numbers but no freedom."""
        for placement in plan:
            layout = layout_of(model.get_submodule(placement.path))
            if placement.kind == LOW_RANK and layout is not None:
                out = placement.slice.width if placement.slice else layout.out_features
                if placement.rank > min(layout.in_features, out):
                    raise BadMethod(
                        f"rank {placement.rank} is above the matrix of {placement.path} ({out} x {layout.in_features});"
                        f" the largest rank there is {min(layout.in_features, out)}"
                    )

    def build(self, placement: Placement, module: nn.Module) -> LowRank:
        """A fresh delta: zero update, A random (for an embedding: B random, A zero)."""
        layout = layout_of(module)
        if layout is None:
            raise BadMethod(f"{placement.path} is a {type(module).__name__}, which LoRA cannot adapt")
        return LowRank(placement, layout, self.dropout)

    def to_peft(self, deltas: Sequence[Delta]) -> tuple[dict[str, Any], Tensors]:
        """PEFT's fields and tensors; slices of one fused layer become one block of the summed rank."""
        low = [delta for delta in deltas if isinstance(delta, LowRank)]
        extra = {"lora_dropout": self.dropout, "use_rslora": self.scaling != "alpha/r", "bias": self.bias}
        return peft_format.write(low, rooted=self.scaling != "alpha/r", extra=extra)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Tensors, model: nn.Module) -> tuple[Self, Plan]:
        """The LoRA of a PEFT folder; ranks come from the tensors, alphas from the first matching pattern."""
        method = cls(**peft_format.fields(config, tensors, model))
        return method, method.plan(model)

    def read(self, deltas: Sequence[Delta], tensors: Tensors) -> list[str]:
        """Copy A and B out of `tensors` into the deltas."""
        return peft_format.read([delta for delta in deltas if isinstance(delta, LowRank)], tensors)


def _per_site(model: nn.Module, sites: list[Site], given: Mapping[str, Any]) -> list[Any]:
    """The value that each site is given by the most specific matching key (glob, then role, then group), or None."""
    values: dict[tuple[str, Any], Any] = {}
    for key in sorted(given, key=lambda key: _specificity(key, sites)):
        matched = matching(sites, key, model)
        hit = [site for site in sites if site in matched or site.path in {m.path for m in matched if m.slice is None}]
        if not hit:
            roles = {site.role for site in sites} | set(GROUPS)
            raise NoSuchTarget(f"{key!r} is given a rank or alpha but is not among the targets; {nearest(key, roles)}")
        values |= {(site.path, site.slice): given[key] for site in hit}
    return [values.get((site.path, site.slice)) for site in sites]


def _specificity(key: str, sites: Iterable[Site]) -> int:
    if key in GROUPS:
        return 0
    return 1 if any(site.role == key for site in sites) else 2


class LowRank(Delta):
    """s B A: the update of one site, of rank R."""

    layout: Layout

    def __init__(self, placement: Placement, layout: Layout, dropout: float = 0.0) -> None:
        super().__init__(placement, layout)
        out = placement.slice.width if placement.slice else layout.out_features
        a_RI, b_OR = registry.find("lorakit.inits", placement.init).init(layout.in_features, out, placement.rank)
        if layout.lookup:  # an embedding's input selects columns of A, so A is the zero half (loralib, PEFT)
            a_RI, b_OR = torch.zeros_like(a_RI), torch.randn(out, placement.rank)
        self.A, self.B = nn.Parameter(a_RI), nn.Parameter(b_OR)
        self.scale, self.dropout = placement.scale, dropout

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s B A dropout(x); A and B are cast to y's dtype, x never is."""
        a_RI, b_OR = self.A.to(y.dtype), self.B.to(y.dtype)
        drop = self.dropout if self.training else 0.0
        if self.layout.lookup:
            low = F.dropout(self.layout.project(x, a_RI), drop)
        else:
            low = self.layout.project(F.dropout(x, drop) if drop else x, a_RI)
        return y + self.layout.lift(low * self.scale, b_OR).to(y.dtype)

    def fold(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B A."""
        return torch.addmm(weight_OI, self.B.to(weight_OI), self.A.to(weight_OI), alpha=self.scale), bias_O

    @classmethod
    def rows(cls, deltas: Sequence[LowRank | None], rows_B: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """All rows in two batched products: each row gathers its own A and B, padded to the largest rank."""
        some = [delta for delta in deltas if delta is not None]
        plain = all(isinstance(d.layout, LinearLayout) and not (d.dropout and d.training) for d in some)
        if not plain:
            return super().rows(deltas, rows_B, x, y)
        a_NRI, b_NOR = _stack(deltas, y.dtype)
        a_BRI, b_BOR = a_NRI[rows_B], b_NOR[rows_B]  # row -1 is the zero factor at the end
        x_BTI = x.reshape(x.shape[0], -1, x.shape[-1])
        low_BTR = torch.bmm(x_BTI, a_BRI.mT)
        return some[0].within(y, lambda part: part + torch.bmm(low_BTR, b_BOR.mT).reshape(part.shape).to(y.dtype))


def _stack(deltas: Sequence[LowRank | None], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (N + 1, R, I) and s B (N + 1, O, R) of all adapters, zero where an adapter has none and in the last place."""
    some = [delta for delta in deltas if delta is not None]
    rank = max(delta.placement.rank for delta in some)
    none_A, none_B = some[0].A.new_zeros(rank, some[0].A.shape[1]), some[0].B.new_zeros(some[0].B.shape[0], rank)
    pads = [None if delta is None else rank - delta.placement.rank for delta in deltas]
    pairs = list(zip(deltas, pads, strict=True))
    a = [none_A if d is None or pad is None else F.pad(d.A, (0, 0, 0, pad)) for d, pad in pairs]
    b = [none_B if d is None or pad is None else F.pad(d.B * d.scale, (0, pad)) for d, pad in pairs]
    return torch.stack([*a, none_A]).to(dtype), torch.stack([*b, none_B]).to(dtype)
