"""What the low-rank methods share: their fields, and factors A and B of one site's update.

Legend: B batch, T tokens, I in, O out, R rank, N adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.experts import WEIGHT, shape_of
from lorakit.core.initialise import Initialisation, initialisation
from lorakit.core.layouts import Layout, kind_of, layout_of
from lorakit.core.method import Rules, Tensors
from lorakit.core.plan import Placement, Plan
from lorakit.core.replace import BiasMode, bias_placements
from lorakit.core.sites import GROUPS, Site, matching, weight_at
from lorakit.core.statistics import SiteStatistics
from lorakit.errors import BadMethod, NoSuchTarget, nearest
from lorakit.methods import _lora_peft as peft_format
from lorakit.methods._targeted import Targeted, share, whole

LOW_RANK = "low-rank"
Scaling = Literal["alpha/r", "alpha/sqrt(r)"]


@dataclass(frozen=True, kw_only=True)
class LowRankMethod(Targeted):
    """A method whose deltas hold A (r, in) and B (out, r)."""

    kinds: ClassVar[tuple[str, ...]] = (LOW_RANK,)

    rank: int = 8  # R; rows of A, columns of B
    alpha: float = 16.0  # the update is scaled by alpha / rank
    ranks: Mapping[str, int] = field(default_factory=dict)  # rank of single targets
    alphas: Mapping[str, float] = field(default_factory=dict)  # alpha of single targets
    init: str = "kaiming"  # a file of inits/: gaussian (the paper's), kaiming (loralib's), pissa, olora, ...
    scaling: Scaling = "alpha/r"  # or alpha/sqrt(r)
    dropout: float = 0.0  # on the branch's input only
    bias: BiasMode = "none"  # train biases too: of the adapted layers (lora_only) or all

    def __post_init__(self) -> None:
        super().__post_init__()
        initialisation(self.init)

    def _rules(self) -> Rules:
        yield from (whole("rank", rank) for rank in (self.rank, *self.ranks.values()))
        yield share("dropout", self.dropout)
        something = bool(self.targets or self.train or self.bias == "all")
        yield "targets", self.targets, "roles, groups or globs, at least one", something

    def needs(self) -> frozenset[str]:
        """What the initialisation needs."""
        return initialisation(self.init).needs

    def sites(self, model: nn.Module) -> list[Site]:
        """The targets' sites; calibration gathers nothing of stacked experts."""
        sites = super().sites(model)
        stacked = next((site for site in sites if site.experts), None)
        if stacked is not None and self.needs():
            raise BadMethod(f"{self.init!r} starts from statistics, which stacked experts ({stacked.path}."
                            f"{stacked.parameter}) have none of; take init='kaiming' or leave them out")  # fmt: skip
        return sites

    def places(self, model: nn.Module, statistics: Mapping[Any, Any] | None) -> Sequence[Placement]:
        """One low-rank placement a site, then biases."""
        sites = self.sites(model)
        ranks, alphas = _per_site(model, sites, self.ranks), _per_site(model, sites, self.alphas)
        shared_out = self._shared_out(sites, statistics)
        low = [
            self._placement(site, int(rank or usual), self._alpha(alpha, usual))
            for site, rank, usual, alpha in zip(sites, ranks, shared_out, alphas, strict=True)
            if rank or usual
        ]
        return (*low, *bias_placements(model, self.bias, (placement.path for placement in low)))

    def _alpha(self, own: float | None, shared_out: int) -> float:
        """A site's alpha; one that was given another rank by its data keeps the scale of the others (EVA)."""
        return self.alpha * (shared_out or self.rank) / self.rank if own is None else float(own)

    def _shared_out(self, sites: list[Site], statistics: Mapping[Any, Any] | None) -> list[int]:
        """The rank of each site: the method's, or as the initialisation shares ranks out by statistics."""
        share = initialisation(self.init).ranks
        if share is None or statistics is None:
            return [self.rank] * len(sites)
        absent = [site.path for site in sites if (site.path, site.slice) not in statistics]
        if absent:
            raise BadMethod(f"the statistics have nothing of {absent[0]}; calibrate(model, method.sites(model), ...)")
        found = [statistics[site.path, site.slice] for site in sites]
        try:
            return share(found, self.rank)
        except BadMethod as error:
            few = (site for site, each in zip(sites, found, strict=True) if each.tokens <= self.rank)
            raise BadMethod(f"{next(few, sites[0]).path} cannot be initialised by {self.init!r}: {error}") from error

    def _placement(self, site: Site, rank: int, alpha: float) -> Placement:
        scale = alpha / (rank if self.scaling == "alpha/r" else math.sqrt(rank))
        place = site.path, site.role, LOW_RANK, site.slice
        return Placement(*place, rank, alpha, scale, self.init, parameter=site.parameter)

    def check(self, plan: Plan, model: nn.Module) -> None:
        """Refuse a rank above the matrix it adapts: it would add numbers but no freedom."""
        for placement in plan:
            if placement.kind == LOW_RANK:
                refuse_above_matrix(placement, model.get_submodule(placement.path))

    def start(self, deltas: Sequence[Delta], model: nn.Module, statistics: Mapping[Any, Any] | None) -> None:
        """A fresh adapter is the base: B is zero, or B0 A0 is taken off again."""
        for delta in deltas:
            if isinstance(delta, Factors):
                delta.start(model.get_submodule(delta.placement.path), statistics)

    def to_peft(self, deltas: Sequence[Delta]) -> tuple[dict[str, Any], Tensors]:
        """PEFT's fields and tensors; slices of one fused layer become one block of the summed rank."""
        extra = {"lora_dropout": self.dropout, "use_rslora": self.scaling != "alpha/r", "bias": self.bias}
        return peft_format.write(factors(deltas), rooted=self.scaling != "alpha/r", extra=extra)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Tensors, model: nn.Module) -> tuple[Self, Plan]:
        """The method of a PEFT folder; ranks come from the tensors, alphas from the first matching pattern."""
        method = cls(**peft_format.fields(config, tensors, model))
        return method, method.plan(model)

    def read(self, deltas: Sequence[Delta], tensors: Tensors) -> list[str]:
        """Copy A and B out of `tensors` into the deltas."""
        return peft_format.read(factors(deltas), tensors)


def refuse_above_matrix(placement: Placement, module: nn.Module) -> None:
    """Refuse a rank above that of the matrix itself, where the module has one.

    Raises:
        BadMethod: the rank is larger than the smaller side.
    """
    shape = shape_of(module, placement.parameter)
    if shape is None:
        return
    *_, out, inner = shape
    out = placement.slice.width if placement.slice else out
    if placement.rank > min(inner, out):
        raise BadMethod(f"rank {placement.rank} is above the matrix of {placement.path} ({out} x {inner}); the largest "
                        f"rank there is {min(inner, out)}")  # fmt: skip


def _per_site(model: nn.Module, sites: list[Site], given: Mapping[str, Any]) -> list[Any]:
    """The value that each site is given by the most specific matching key (glob, then role, then group), or None."""
    values: dict[Any, Any] = {}
    for key in sorted(given, key=lambda key: _specificity(key, sites)):
        matched = matching(sites, key, model)
        whole_ones = {(site.path, site.parameter) for site in matched if site.slice is None}
        hit = [site for site in sites if site in matched or (site.path, site.parameter) in whole_ones]
        if not hit:
            roles = {site.role for site in sites} | set(GROUPS)
            raise NoSuchTarget(f"{key!r} is given a rank or alpha but is not among the targets; {nearest(key, roles)}")
        values |= {site.key: given[key] for site in hit}
    return [values.get(site.key) for site in sites]


def _specificity(key: str, sites: Iterable[Site]) -> int:
    if key in GROUPS:
        return 0
    return 1 if any(site.role == key for site in sites) else 2


class Factors(Delta):
    """A (R, in) and B (out, R) of one site; s (B A - B0 A0) is its update, B0 A0 what an initialisation began with.

    Of stacked experts there is an A and a B each, along a first dimension.
    """

    outer: ClassVar[tuple[str, ...]] = ("B",)
    stacked: ClassVar[bool] = False  # whether it adapts stacked experts, rather than a layer
    layout: Layout

    def __init__(self, placement: Placement, module: nn.Module, dropout: float = 0.0) -> None:
        shape = shape_of(module, placement.parameter)
        if shape is None or self.stacked != (placement.parameter != WEIGHT):
            raise BadMethod(f"{placement.path} is a {kind_of(module)}, which lorakit cannot adapt")
        super().__init__(placement, layout_of(module))
        if placement.rank < 1:  # a file may tell anything
            raise BadMethod(f"{placement.path} has the rank {placement.rank}; a low-rank update needs at least 1")
        initialisation(placement.init)
        *experts, out, inner = shape
        out = placement.slice.width if placement.slice else out
        self.A = nn.Parameter(torch.zeros(*experts, placement.rank, inner))
        self.B = nn.Parameter(torch.zeros(*experts, out, placement.rank))
        self.A0: Tensor | None
        self.B0: Tensor | None
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)
        self.scale, self.dropout = placement.scale, dropout

    @torch.no_grad()
    def start(self, module: nn.Module, statistics: Mapping[Any, Any] | None) -> None:
        """Take the first values from the initialisation that the placement names."""
        init, place = initialisation(self.placement.init), self.placement
        lookup = not self.stacked and self.layout.lookup
        if lookup and not init.random:
            raise BadMethod(f"{place.path} is an embedding, which {init.name} cannot start; take kaiming or gaussian")
        if lookup:  # an embedding's input selects columns of A, so A is the zero half (loralib, PEFT)
            self.B.copy_(torch.randn(self.B.shape))
            return
        found = None if statistics is None else statistics.get((place.path, place.slice))
        a_RI, b_OR = self.first(init, module, found)
        if init.splits and self.scale > 0:  # B A is the update itself
            a_RI, b_OR = a_RI / math.sqrt(self.scale), b_OR / math.sqrt(self.scale)
        self.A.copy_(a_RI)
        self.B.copy_(b_OR)
        if not b_OR.is_meta and bool(b_OR.any()):
            self.keep_start(a_RI, b_OR)

    def first(
        self, init: Initialisation, module: nn.Module, statistics: SiteStatistics | None
    ) -> tuple[Tensor, Tensor]:
        """The initialisation's A and B."""
        place = self.placement
        return init.factors(weight_at(module, place.slice), place.rank, statistics, place.path)

    def keep_start(self, a_RI: Tensor, b_OR: Tensor) -> None:
        """Take B0 A0 off the update from now on."""
        self.A0, self.B0 = a_RI.detach().clone().to(self.A), b_OR.detach().clone().to(self.B)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B such that s B A is the whole update: [A; A0] and [B, -B0] where there is a start to take off."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A0], -2), torch.cat([self.B, -self.B0], -1)

    def difference(self) -> tuple[Tensor, Tensor]:
        """The same update as [A; A - A0] and [B - B0, B0]: nothing cancels, and at the start it is exactly zero."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A - self.A0], -2), torch.cat([self.B - self.B0, self.B0], -1)

    def branch(self, x: Tensor, y: Tensor) -> Tensor:
        """s (B A - B0 A0) dropout(x) in y's dtype; A and B are cast to it, x never is."""
        a_RI, b_OR = (factor.to(y.dtype) for factor in self.difference())
        drop = self.dropout if self.training else 0.0
        if self.layout.lookup:
            low = F.dropout(self.layout.project(x, a_RI), drop)
        else:
            low = self.layout.project(F.dropout(x, drop) if drop else x, a_RI)
        return self.layout.lift(low * self.scale, b_OR).to(y.dtype)

    def updated(self, weight_OI: Tensor) -> Tensor:
        """W + s (B A - B0 A0)."""
        a_RI, b_OR = self.difference()
        return torch.addmm(weight_OI, b_OR.to(weight_OI), a_RI.to(weight_OI), alpha=self.scale)


def factors(deltas: Sequence[Delta]) -> list[Factors]:
    """The low-rank ones among deltas."""
    return [delta for delta in deltas if isinstance(delta, Factors)]
