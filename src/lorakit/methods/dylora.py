"""DyLoRA: one training for every rank (Valipour et al. 2022, arXiv:2210.07558).

Legend: I in, O out, R rank, b the rank in use.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.attach import new_deltas, put
from lorakit.core.checked import fits
from lorakit.core.delta import Delta
from lorakit.core.method import Rules
from lorakit.core.plan import Placement
from lorakit.core.state import Attached, attached_to, deltas_of
from lorakit.errors import BadMethod
from lorakit.methods._low_rank import LOW_RANK, Factors, LowRankMethod
from lorakit.methods._targeted import whole
from lorakit.methods.lora import LoRA

Distribution = Literal["uniform", "geometric"]


@dataclass(frozen=True, kw_only=True)
class DyLoRA(LowRankMethod):
    """h = W0 x + (alpha / b) B[:, :b] A[:b] x, where each training step draws b out of `rank_min` to R.

    The first directions are trained in every step and the last in few, so that they come to be sorted by what they are
    worth, and the first b of them are a LoRA adapter of rank b: `DyLoRA.truncate` makes it. Out of training all of them
    are used. R is `rank`, or the largest rank of a site, where `ranks` or data give one more. All sites have
    the same b in a step (or their whole rank, where that is smaller); it depends on `seed` and on the step's number
    only. With `frozen`, a step trains the b-th direction alone and leaves those before it as is.

    Example:
        >>> DyLoRA(rank=8, distribution="geometric").rank_min
        1

    Paper: Valipour et al. 2022, https://arxiv.org/abs/2210.07558.
    """

    name: ClassVar[str] = "dylora"
    peft_type: ClassVar[str] = "LORA"

    rank_min: int = 1  # smallest rank to be drawn
    distribution: Distribution = "uniform"  # of b: uniform, or geometric (small ranks more often)
    stop: float = 0.15  # of the geometric distribution: P(b) ~ (1 - stop)^(b - rank_min)
    frozen: bool = False  # a step trains only the last of the directions that it uses
    seed: int = 0  # of the ranks drawn

    def _rules(self) -> Rules:
        yield from super()._rules()
        yield whole("rank_min", self.rank_min)
        yield "rank_min", self.rank_min, f"at most rank ({self.rank})", self.rank_min <= self.rank
        yield "stop", self.stop, "above 0 and below 1", 0 < self.stop < 1
        yield whole("seed", self.seed, 0)

    @classmethod
    def is_in_peft(cls, config: Mapping[str, Any]) -> bool:
        """Never: a folder of PEFT's is plain LoRA."""
        return False

    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> Nested:
        """Room for A and B."""
        return Nested(placement, module, self.dropout, rooted=self.scaling != "alpha/r", frozen=self.frozen)

    def ranks_for(self, plan: Sequence[Placement]) -> range:
        """The ranks that a training of these placements draws from."""
        return range(self.rank_min, max([self.rank, *(placement.rank for placement in plan)]) + 1)

    def drawn(self, step: int, ranks: range) -> int:
        """The rank b of a training step.

        >>> [DyLoRA(rank=4).drawn(step, range(1, 5)) for step in range(1, 9)]
        [1, 1, 3, 3, 2, 3, 4, 4]
        """
        weights = [1.0 if self.distribution == "uniform" else (1 - self.stop) ** b for b in ranks]
        return random.Random(f"{self.seed} {step}").choices(ranks, weights)[0]

    def before_step(self, deltas: Sequence[Delta], step: int, steps: int) -> None:
        """Draw the rank of this step."""
        rank = self.drawn(step, self.ranks_for([delta.placement for delta in nested(deltas)]))
        for delta in nested(deltas):
            delta.drawn = rank

    def after_step(self, deltas: Sequence[Delta], step: int, steps: int) -> None:
        """Between steps the whole rank is in use."""
        self.rest(deltas)

    def rest(self, deltas: Sequence[Delta]) -> None:
        """The whole rank is in use."""
        for delta in nested(deltas):
            delta.drawn = None

    @staticmethod
    def truncate(
        model: nn.Module,
        name: str,
        rank: int,
        new_name: str | None = None,
        *,
        trainable: bool = False,
        active: bool = True,
    ) -> str:
        """Attach the first `rank` directions of a DyLoRA adapter as a LoRA adapter of its own; the former stays.

        Its outputs are those of a training step of that rank. It shares no numbers with the adapter that it is taken
        from. Modules that were trained whole, a head for instance, come along.

        Args:
            model: the model that has the adapter.
            name: the DyLoRA adapter.
            rank: from the method's `rank_min` to its `rank`, or to the largest rank of a site where that is more.
            new_name: what the LoRA adapter is called (default: the name and the rank, `reviews-4`).
            trainable: whether its numbers are trained further.
            active: whether to switch to it.

        Returns:
            The LoRA adapter's name.

        Raises:
            NoSuchAdapter: no adapter of that name.
            BadMethod: it is no DyLoRA adapter, or was not trained for that rank.
            BadState: the new name is taken, or an adapter is merged.

        Example:
            >>> import lorakit as lk
            >>> from transformers import GPT2Config, GPT2Model
            >>> model = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
            >>> lk.attach(model, DyLoRA(rank=4), name="a")
            >>> DyLoRA.truncate(model, "a", 2)
            'a-2'
            >>> sum(p.numel() for p in lk.parameters(model, "a"))
            128
        """
        record = attached_to(model, name)
        method = _narrowed(record, name, rank)
        plan = tuple(_shortened(each, rank, method) if each.kind == LOW_RANK else each for each in record.plan)
        built = new_deltas(model, method, plan)
        for (_, new), old in zip(built, deltas_of(model, name), strict=True):
            _copy(new, old)
        new_name = f"{name}-{rank}" if new_name is None else new_name
        put(model, new_name, Attached(method, plan, trainable), built, active=active)
        return new_name


class Nested(Factors):
    """(alpha / b) B[:, :b] A[:b] of one site in a training step of rank b; of the whole rank R otherwise."""

    def __init__(self, placement: Placement, module: nn.Module, dropout: float, *, rooted: bool, frozen: bool) -> None:
        super().__init__(placement, module, dropout)
        self.rooted, self.frozen = rooted, frozen
        self.drawn: int | None = None

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y + (alpha / b) B[:, :b] A[:b] dropout(x)."""
        return y + (self.branch(x, y) if self.drawn is None or not self.training else self.narrow(x, y, self.drawn))

    def fold(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + (alpha / R) B A."""
        return self.updated(weight_OI), bias_O

    def narrow(self, x: Tensor, y: Tensor, rank: int) -> Tensor:
        """`branch`, of rank b."""
        a_RI, b_OR = (factor.to(y.dtype) for factor in self.factors_of(rank))
        lookup = self.layout.lookup
        low = self.layout.project(x if lookup else F.dropout(x, self.dropout), a_RI)
        low = F.dropout(low, self.dropout) if lookup else low
        return self.layout.lift(low * self.scale_at(rank), b_OR).to(y.dtype)

    def scale_at(self, rank: int) -> float:
        """alpha / b, or alpha / sqrt(b)."""
        rank = min(rank, self.placement.rank)
        return self.placement.alpha / (math.sqrt(rank) if self.rooted else rank)

    def factors_of(self, rank: int) -> tuple[Tensor, Tensor]:
        """`difference`, of rank b."""
        a_RI, b_OR = self.A[:rank], self.B[:, :rank]
        if self.frozen:
            a_RI = torch.cat([a_RI[:-1].detach(), a_RI[-1:]])
            b_OR = torch.cat([b_OR[:, :-1].detach(), b_OR[:, -1:]], 1)
        if self.A0 is None or self.B0 is None:
            return a_RI, b_OR
        a0_RI, b0_OR = self.A0[:rank], self.B0[:, :rank]
        return torch.cat([a_RI, a_RI - a0_RI]), torch.cat([b_OR - b0_OR, b0_OR], 1)


def nested(deltas: Sequence[Delta]) -> list[Nested]:
    """The method's own among deltas."""
    return [delta for delta in deltas if isinstance(delta, Nested)]


def _narrowed(record: Attached, name: str, rank: int) -> LoRA:
    """LoRA of a rank for which a DyLoRA adapter was trained."""
    method = record.method
    if not isinstance(method, DyLoRA):
        raise BadMethod(
            f"{name!r} is {method.name}, which was trained for one rank only; truncate takes DyLoRA adapters"
        )
    drawn = method.ranks_for(record.plan)
    if not fits(rank, int) or rank not in drawn:
        raise BadMethod(f"{name!r} was trained for the ranks {drawn[0]} to {drawn[-1]}, not for {rank!r}")
    common = {field.name: getattr(method, field.name) for field in fields(LoRA)}
    ranks = {target: min(own, rank) for target, own in method.ranks.items()}
    return LoRA(**common | {"rank": min(method.rank, rank), "ranks": ranks})


def _shortened(placement: Placement, rank: int, method: LoRA) -> Placement:
    rank = min(placement.rank, rank)
    return replace(
        placement, rank=rank, scale=placement.alpha / (rank if method.scaling == "alpha/r" else math.sqrt(rank))
    )


@torch.no_grad()
def _copy(new: Delta, old: Delta) -> None:
    """The first directions of `old`, or all of it where it has none."""
    if not isinstance(new, Factors) or not isinstance(old, Factors):
        new.load_state_dict(old.state_dict())
        return
    rank = new.placement.rank
    new.A.copy_(old.A[:rank])
    new.B.copy_(old.B[:, :rank])
    if old.A0 is not None and old.B0 is not None:
        new.keep_start(old.A0[:rank], old.B0[:, :rank])
