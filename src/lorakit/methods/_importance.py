"""What the methods share whose ranks change in training: a budget of directions, and a choice of those that matter.

A direction is a row of A and the column of B that belongs to it. All directions of all sites compete for one budget.

Legend: I in, O out, R rank (directions of one site), N directions of all sites, K directions that a file holds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.method import Rules
from lorakit.core.plan import Placement
from lorakit.core.replace import BiasMode, bias_placements
from lorakit.core.sites import Site
from lorakit.errors import BadMethod
from lorakit.methods._low_rank import LOW_RANK, Factors, refuse_above_matrix
from lorakit.methods._peft import by_path
from lorakit.methods._targeted import Targeted, share, whole


def budget(step: int, steps: int, *, start: int, end: int, warmup: int, final: int) -> int:
    """How many directions may be kept after a step of `steps`: from `start` to `end`, along a cubic curve.

    b(t) = b0 up to t_i, then b_T + (b0 - b_T)(1 - (t - t_i) / (T - t_i - t_f))³ cut to a whole number, then b_T.

    >>> [budget(t, 3000, start=864, end=576, warmup=500, final=1500) for t in (500, 510, 750, 1000, 1250, 1400)]
    [864, 855, 697, 612, 580, 576]
    """
    last = steps - final
    if step <= warmup:
        return start
    if step >= last:
        return end
    left = 1 - (step - warmup) / (last - warmup)
    return int((start - end) * left**3 + end)


def at_most(name: str, value: int, other: str, most: int) -> tuple[str, object, str, bool]:
    """The rule of a rank that another bounds."""
    return name, value, f"a whole number from 1 to {other} ({most})", 1 <= value <= most


class Phase(NamedTuple):
    """What is due after one optimiser step."""

    watches: bool  # importance goes on being averaged
    changes: bool  # directions are chosen anew
    is_final: bool  # the choice stands


@dataclass(frozen=True, kw_only=True)
class Budgeted(Targeted):
    """A method that shares out a budget of directions while it trains."""

    kinds: ClassVar[tuple[str, ...]] = (LOW_RANK,)

    dropout: float = 0.0  # on the branch's input only
    bias: BiasMode = "none"  # train biases too: of the adapted layers (lora_only) or all
    warmup: float = 0.1  # t_i: steps before ranks change; below 1, that share of the run
    final: float = 0.4  # t_f: steps at the end in which ranks stay; below 1, that share of the run
    every: int = 10  # ΔT: steps between two changes of ranks
    beta1: float = 0.85  # how long the average of a number's sensitivity remembers
    beta2: float = 0.85  # how long the average of that sensitivity's uncertainty remembers

    def _rules(self) -> Rules:
        yield from super()._rules()
        yield share("dropout", self.dropout)
        for name, value in (("warmup", self.warmup), ("final", self.final)):
            good = value >= 0 and (value < 1 or value == int(value))
            yield name, value, "a share of the run below 1, or a whole number of steps", good
        together = sum(value for value in (self.warmup, self.final) if value < 1)
        yield "final", self.final, f"below 1 together with warmup={self.warmup}", together < 1
        yield whole("every", self.every)
        yield share("beta1", self.beta1)
        yield share("beta2", self.beta2)

    def places(self, model: nn.Module, statistics: Mapping[Any, Any] | None) -> Sequence[Placement]:
        """One low-rank placement a site, each with the same room, then biases."""
        sites = self.sites(model)
        for site in sites:
            if site.layout is not None and site.layout.lookup:
                raise BadMethod(f"{self.name} needs Linear, Conv1D or Conv2d layers, but {site.path} is an Embedding")
        low = [self._placement(site) for site in sites]
        return (*low, *bias_placements(model, self.bias, (placement.path for placement in low)))

    @abstractmethod
    def _placement(self, site: Site) -> Placement:
        """The placement of one site."""

    def before_step(self, deltas: Sequence[Delta], step: int, steps: int) -> None:
        """Refuse a run that is too short for the schedule."""
        del deltas, step
        warmup, last = self._turns(steps)
        if warmup >= last:
            raise BadMethod(f"{self.name} has no step in which ranks may change: of {steps} steps, {warmup} are warmup "
                            f"and {steps - last} final; train longer, or lower these two")  # fmt: skip

    def _turns(self, steps: int) -> tuple[int, int]:
        """The last step of the warm-up, and the step whose choice of directions stands."""
        warmup, final = (int(value * steps if value < 1 else value) for value in (self.warmup, self.final))
        return warmup, steps - final

    def phase(self, step: int, steps: int) -> Phase:
        """What is due after a step of a run."""
        warmup, last = self._turns(steps)
        due = step == last or (warmup < step < last and step % self.every == 0)
        return Phase(step < last, due, step > last)

    def allowed(self, step: int, steps: int, *, start: int, end: int) -> int:
        """`budget` of this schedule."""
        warmup, last = self._turns(steps)
        return budget(step, steps, start=start, end=end, warmup=warmup, final=steps - last)


class Directions(Factors):
    """Factors of R directions, some of them pruned, with the averages by which that is decided.

    A pruned direction does nothing but may return, so it keeps its place: shapes never change. `order_R` puts the kept
    ones first. Out of training the factors are used in that order, which is a file's: so a loaded adapter, which has
    them there in the first place, gives the same bits.
    """

    kept_R: Tensor
    order_R: Tensor

    def __init__(self, placement: Placement, module: nn.Module, dropout: float) -> None:
        refuse_above_matrix(placement, module)
        super().__init__(placement, module, dropout)
        self.register_buffer("kept_R", torch.ones(placement.rank, dtype=torch.bool), persistent=False)
        self.register_buffer("order_R", torch.arange(placement.rank), persistent=False)
        self._watch("A")
        self._watch("B")

    def _watch(self, name: str) -> None:
        """Keep averages of a parameter's importance; an adapter's file does without them."""
        for what in ("sensitivity", "uncertainty"):
            self.register_buffer(f"{what}_{name}", torch.zeros_like(self.get_parameter(name)), persistent=False)

    def watched(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each parameter with its Ī and Ū."""
        for name, value in self.named_parameters():
            yield value, self.get_buffer(f"sensitivity_{name}"), self.get_buffer(f"uncertainty_{name}")

    def importance(self) -> Tensor:
        """S (R): Ī Ū, averaged over the numbers of each factor that belong to a direction, and summed over factors."""
        parts = [(mean * spread).mean(0 if value is self.B else 1) for value, mean, spread in self.watched()]
        return torch.stack(parts).sum(0)

    @abstractmethod
    def difference(self) -> tuple[Tensor, Tensor]:
        """The factors of the update, in order where the model does not train."""

    def pair(self) -> tuple[Tensor, Tensor]:
        """The same: there is no start to take off."""
        return self.difference()

    @abstractmethod
    def prune(self) -> None:
        """Make the directions that are not kept do nothing."""

    @abstractmethod
    def acts(self) -> Tensor:
        """Which directions (R) do something."""

    @abstractmethod
    def refill(self, first: int, generator: torch.Generator | None) -> None:
        """Give the directions from `first` on the values of fresh ones: they do nothing, but could learn."""

    def keep(self, kept_R: Tensor) -> None:
        """Keep these directions; in the order, those that were kept already stay before the new ones."""
        self.kept_R.copy_(kept_R)
        places_R = (~kept_R[self.order_R]).byte().argsort(stable=True)
        self.order_R.copy_(self.order_R[places_R])

    def ordered(self, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        """Factors with the kept directions first."""
        return a_RI.index_select(0, self.order_R), b_OR.index_select(1, self.order_R)

    def in_use(self) -> int:
        """How many directions are kept."""
        return len(self.kept_R) if self.kept_R.is_meta else int(self.kept_R.sum())

    def held(self) -> int:
        """How many of the ordered directions a file has to hold: up to the last that is kept or does something."""
        if self.kept_R.is_meta:
            return len(self.kept_R)
        found = (self.kept_R | self.acts())[self.order_R].nonzero()
        return int(found.max()) + 1 if len(found) else 1

    @torch.no_grad()
    def settle(self, count: int) -> None:
        """Before K directions are read into the first places: they are kept, and the others are as good as new."""
        self.order_R.copy_(torch.arange(self.placement.rank))
        self.keep(self.order_R < count)
        for _, mean, spread in self.watched():
            mean.zero_()
            spread.zero_()
        self.refill(count, torch.Generator().manual_seed(0))  # not torch's own: loading draws nothing


def directions(deltas: Sequence[Delta]) -> list[Directions]:
    """The deltas that hold directions."""
    return [delta for delta in deltas if isinstance(delta, Directions)]


def by_layer(deltas: Sequence[Delta]) -> dict[str, list[Directions]]:
    """Deltas by the layer they are in: several, where it is fused."""
    return by_path(directions(deltas))


def held_by(layer: Sequence[Directions]) -> int:
    """How many directions of each slice a file holds: as many of all, so that a reader can tell them apart."""
    return max(delta.held() for delta in layer)


def told_by(layer: Sequence[Directions], rows: int | None) -> int:
    """How many directions of each slice a file with so many rows holds; all that fit, where that makes no sense."""
    room, slices = layer[0].placement.rank, len(layer)
    return room if rows is None or rows % slices or rows // slices > room else rows // slices


@torch.no_grad()
def observe(deltas: Sequence[Directions], beta1: float, beta2: float) -> None:
    """Average the sensitivity of every number, I = |w ∂L/∂w|, and its uncertainty.

    Ī ← β1 Ī + (1 - β1) I, then Ū ← β2 Ū + (1 - β2) |I - Ī|; a handful of operations for all sites together.
    """
    values, means, spreads = (
        list(each) for each in zip(*(w for delta in deltas for w in delta.watched()), strict=True)
    )
    now = torch._foreach_mul(values, [torch.zeros_like(w) if w.grad is None else w.grad for w in values])
    torch._foreach_abs_(now)
    torch._foreach_mul_(means, beta1)
    torch._foreach_add_(means, now, alpha=1 - beta1)
    torch._foreach_sub_(now, means)
    torch._foreach_abs_(now)
    torch._foreach_mul_(spreads, beta2)
    torch._foreach_add_(spreads, now, alpha=1 - beta2)


def top(scores_N: Tensor, count: int) -> Tensor:
    """Which scores are among the `count` largest; what ties with the largest of the others is not.

    >>> top(torch.tensor([3.0, 1.0, 2.0, 2.0]), 3).tolist(), top(torch.tensor([3.0, 1.0, 2.0, 2.0]), 2).tolist()
    ([True, False, True, True], [True, False, False, False])
    """
    if count >= len(scores_N):
        return torch.ones_like(scores_N, dtype=torch.bool)
    return scores_N > scores_N.kthvalue(len(scores_N) - count).values


def importances(deltas: Sequence[Directions]) -> Tensor:
    """S (N) of all directions of all sites, on one device."""
    device = deltas[0].kept_R.device
    return torch.cat([delta.importance().to(device) for delta in deltas])


def share_out(deltas: Sequence[Directions], kept_N: Tensor) -> None:
    """Tell each site which of its directions are kept."""
    parts = kept_N.split([delta.placement.rank for delta in deltas])
    for delta, kept_R in zip(deltas, parts, strict=True):
        delta.keep(kept_R.to(delta.kept_R.device))
