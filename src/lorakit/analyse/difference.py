"""What a merged or fully fine-tuned model changed in its base, as low-rank updates: the difference of two checkpoints.

Legend: R rank, I in, O out, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.analyse.randomised import top
from lorakit.core.exchange import Exchange, Form, Update
from lorakit.core.values import Value, value_of
from lorakit.errors import BadModel

ROUNDING = 2.0**-20  # of ‖W‖: a difference below is that of two roundings to float32


@dataclass(frozen=True, eq=False)
class Difference:
    """The updates, and of each matrix the share of ‖ΔW‖_F that they leave out."""

    exchange: Exchange
    lost: Mapping[str, float]
    norms: Mapping[str, float]  # ‖ΔW‖_F of each

    @property
    def left_out(self) -> float:
        """The share of ‖ΔW‖_F of all together that is left out."""
        return math.hypot(*(self.lost[path] * norm for path, norm in self.norms.items())) / math.hypot(
            *self.norms.values()
        )


def difference(
    before: Mapping[str, Value],
    after: Mapping[str, Value],
    rank: int,
    base: str | None = None,
    embeddings: Collection[str] = (),
) -> Difference:
    """ΔW = W' - W of every matrix that differs, by its `rank` strongest directions; two matrices are held at a time.

    Args:
        before: W (out, in) of the base by path; (E, out, in) of stacked experts.
        after: the same of the changed model.
        rank: directions that are kept of each; fewer where a matrix is smaller.
        base: the base's name.
        embeddings: the paths of those that are looked up, not multiplied with; (dimension, vocabulary).

    Raises:
        BadModel: the two are not of one shape, hold NaN, or do not differ; or no direction would be kept.

    >>> w_OI = torch.eye(3)
    >>> found = difference({"q": value_of(w_OI)}, {"q": value_of(w_OI + torch.ones(3, 3))}, rank=1)
    >>> found.exchange.updates[0].rank, found.lost["q"] < 1e-6
    (1, True)
    """
    if rank < 1:
        raise BadModel(f"of each matrix {rank} directions would be kept; give a rank of 1 or more")
    faults = [name for name in before if name not in after or before[name].shape != after[name].shape]
    if faults or before.keys() != after.keys():
        first = (faults or sorted(set(after) - set(before)))[0]
        raise BadModel(f"the two models cannot be compared: {first} is not in both with one shape")
    updates: list[Update] = []
    lost, norms = {}, {}
    for name, value in before.items():
        w, delta = value.read().float(), after[name].read().float()
        delta -= w
        if not bool(delta.isfinite().all()):
            raise BadModel(f"the two models cannot be compared: {name} holds NaN or infinity")
        if (norm := float(delta.norm())) > ROUNDING * float(w.norm()):
            norms[name] = norm
            a, b, lost[name] = _factors(delta, min(rank, *value.shape[-2:]))
            form: Form = "experts" if delta.ndim > 2 else "embedding" if name in embeddings else "linear"
            updates.append(Update(name, value_of(a), value_of(b), float(a.shape[-2]), form=form))
    if not updates:
        raise BadModel("the two models have the same weights, so there is nothing to analyse")
    return Difference(Exchange("difference", tuple(updates), base=base), lost, norms)


def _factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A, B and the share that they leave out; of experts one pair each."""
    tops = [top(each_OI, rank) for each_OI in (delta if delta.ndim > 2 else delta[None])]
    a_ERI = torch.stack([each.right_IR.T for each in tops]).float()
    b_EOR = torch.stack([each.left_OR * each.values_R for each in tops]).float()
    norms, kept = torch.tensor([(each.norm, each.captured) for each in tops], dtype=torch.float64).T
    left = float(((1 - kept).clamp(min=0) * norms.square()).sum().sqrt() / norms.norm())
    return (a_ERI, b_EOR, left) if delta.ndim > 2 else (a_ERI[0], b_EOR[0], left)
