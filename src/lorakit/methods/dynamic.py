"""LoRA whose rank grows and shrinks while it trains, by the importance machinery of AdaLoRA (arXiv:2303.10512).

Legend: I in, O out, R room for directions at one site, K directions that a file holds, N directions of all sites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.layouts import Layout
from lorakit.core.method import Rules, Tensors
from lorakit.core.plan import Placement
from lorakit.core.sites import Site
from lorakit.methods import _lora_peft as peft_format
from lorakit.methods._importance import (
    Budgeted,
    Directions,
    at_most,
    by_layer,
    directions,
    held_by,
    importances,
    observe,
    share_out,
    told_by,
    top,
)
from lorakit.methods._low_rank import LOW_RANK
from lorakit.methods._targeted import whole


@dataclass(frozen=True, kw_only=True)
class DynamicLoRA(Budgeted):
    """h = W0 x + s B A x, where the rank of each site changes in training, within room for `rank_max`.

    A direction is a row of A and its column of B. Each site starts with `rank_start` of them; a budget for all sites
    together then moves along a cubic curve to `rank_end` a site on average. Every `every` steps:

    - while the budget grows, the directions that promise most are added and none is taken away. A new one begins with a
      zero column of B, so nothing that was learned changes at that moment;
    - otherwise all directions compete, and the least important are pruned: their column of B becomes zero. Their row of
      A stays, and with it they may return, beginning at zero again.

    What a pruned direction promises is seen from the gradient of its zero column of B. The sizes of all tensors stay as
    they are, and so does s = alpha / rank_max. A file holds the directions that are kept: plain LoRA to other readers.

    Example:
        >>> DynamicLoRA(rank_max=12, rank_start=2, rank_end=6, targets="attention").alpha
        24.0

    Paper of the importance and of the curve: Zhang et al. 2023, https://arxiv.org/abs/2303.10512.
    """

    name: ClassVar[str] = "dynamic"
    peft_type: ClassVar[str] = "LORA"

    rank_max: int = 12  # R; room for directions at each site
    rank_start: int = 4  # directions of each site at the start
    rank_end: int = 8  # directions of a site at the end, on average
    alpha: float = 24.0  # the update is scaled by alpha / rank_max

    def _rules(self) -> Rules:
        yield from super()._rules()
        yield whole("rank_max", self.rank_max)
        yield at_most("rank_start", self.rank_start, "rank_max", self.rank_max)
        yield at_most("rank_end", self.rank_end, "rank_max", self.rank_max)

    @classmethod
    def is_in_peft(cls, config: Mapping[str, Any]) -> bool:
        """Never: a folder of PEFT's is plain LoRA."""
        return False

    def _placement(self, site: Site) -> Placement:
        scale = self.alpha / self.rank_max
        return Placement(site.path, site.role, LOW_RANK, site.slice, self.rank_max, self.alpha, scale, "kaiming")

    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> Masked:
        """Room for A and B."""
        return Masked(placement, module, self.dropout)

    def start(self, deltas: Sequence[Delta], model: nn.Module, statistics: Mapping[Any, Any] | None) -> None:
        """A random, B zero; the first `rank_start` directions of each site are kept."""
        for delta in directions(deltas):
            delta.start(model.get_submodule(delta.placement.path), statistics)
            delta.keep(delta.order_R < self.rank_start)

    @torch.no_grad()
    def after_step(self, deltas: Sequence[Delta], step: int, steps: int) -> None:
        """Follow the importance of every number, and now and then choose directions anew."""
        phase, own = self.phase(step, steps), directions(deltas)
        if phase.watches:
            observe(own, self.beta1, self.beta2)
        _prune(own)  # the optimiser has moved them
        if phase.changes:
            start, end = (rank * len(own) for rank in (self.rank_start, self.rank_end))
            share_out(own, _chosen(own, self.allowed(step, steps, start=start, end=end)))
            _prune(own)

    def to_peft(self, deltas: Sequence[Delta]) -> tuple[dict[str, Any], Tensors]:
        """PEFT's fields and tensors of plain LoRA with the directions that are kept, a rank a layer."""
        extra = {"lora_dropout": self.dropout, "use_rslora": False, "bias": self.bias}
        counted = [(delta, held_by(layer)) for layer in by_layer(deltas).values() for delta in layer]
        parts = [_part(delta, count, *delta.ordered(delta.A, delta.B)) for delta, count in counted]
        return peft_format.write(parts, rooted=False, extra=extra)

    def read(self, deltas: Sequence[Delta], tensors: Tensors) -> list[str]:
        """Copy directions out of `tensors` into the first places."""
        faults = []
        for path, layer in by_layer(deltas).items():
            stored = tensors.get(f"{path}.lora_A.weight")
            count = told_by(layer, None if stored is None or not stored.dim() else len(stored))
            for delta in layer:
                delta.settle(count)
            faults += peft_format.read([_part(delta, count, delta.A, delta.B) for delta in layer], tensors)
        return faults


class Masked(Directions):
    """s B A of one site, of R directions, where B's columns of the pruned ones are zero."""

    def difference(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return (self.A, self.B) if self.training else self.ordered(self.A, self.B)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s B A dropout(x)."""
        return y + self.branch(x, y)

    def fold(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B A."""
        return self.updated(weight_OI), bias_O

    def prune(self) -> None:
        """B's columns of the pruned are zero; their rows of A stay."""
        self.B.masked_fill_(~self.kept_R, 0.0)

    def acts(self) -> Tensor:
        return (self.B != 0).any(0)

    @torch.no_grad()
    def refill(self, first: int, generator: torch.Generator | None) -> None:
        """Rows of A as at the start, from U(-1/√in, 1/√in); columns of B zero."""
        if self.A.is_meta:
            return
        a_RI, bound = self.A[first:], 1 / math.sqrt(self.layout.in_features)
        a_RI.copy_(bound * (2 * torch.rand(a_RI.shape, generator=generator, device="cpu") - 1))
        self.B[:, first:].zero_()


@dataclass
class _Part:
    """The first K directions of a site, in the words of `_lora_peft`."""

    placement: Placement
    layout: Layout
    A: nn.Parameter
    B: nn.Parameter

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B

    def keep_start(self, a_RI: Tensor, b_OR: Tensor) -> None:
        """There is none to keep: a file with one has the wrong shape."""


def _part(delta: Directions, count: int, a_RI: Tensor, b_OR: Tensor) -> _Part:
    """The first K of these directions of a site."""
    alpha = delta.placement.alpha * count / delta.placement.rank
    a_KI, b_OK = cast(nn.Parameter, a_RI.detach()[:count]), cast(nn.Parameter, b_OR.detach()[:, :count])
    return _Part(replace(delta.placement, rank=count, alpha=alpha), delta.layout, a_KI, b_OK)


def _prune(deltas: Sequence[Directions]) -> None:
    for delta in deltas:
        delta.prune()


def _chosen(deltas: Sequence[Directions], count: int) -> Tensor:
    """Which directions (N) are kept: the most important, and while there are more of them, all that are kept now."""
    kept_N = torch.cat([delta.kept_R.to(deltas[0].kept_R.device) for delta in deltas])
    scores_N = importances(deltas)
    if count > int(kept_N.sum()):
        scores_N = scores_N.masked_fill(kept_N, torch.inf)
    return top(scores_N, count)
