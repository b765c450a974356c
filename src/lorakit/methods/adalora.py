"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (Zhang et al. 2023, arXiv:2303.10512).

Legend: I in, O out, R triplets of one site, K triplets that a file holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, Self

import torch
from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.layouts import Conv1DLayout
from lorakit.core.method import Rules, Tensors
from lorakit.core.named import fill
from lorakit.core.patterns import plain
from lorakit.core.plan import Placement, Plan
from lorakit.core.sites import Site
from lorakit.errors import BadAdapterFile
from lorakit.methods import _peft as peft
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

STD: Final = 0.02  # of P and Q at the start; the paper says Gaussian, its code 0.02
EPSILON: Final = 1e-5  # added to the rank in the scale, by the paper's code and by PEFT
STEPS: Final = 10_000  # what a file tells PEFT of the run's length, which a method does not know
NAMES: Final = ("lora_A", "lora_B", "lora_E")  # Q, P and Λ in a file
READ: Final = {
    "init_r": int | None,
    "target_r": int | None,
    "lora_alpha": float | None,
    "tinit": int | None,
    "tfinal": int | None,
    "deltaT": int | None,
    "beta1": float | None,
    "beta2": float | None,
    "orth_reg_weight": float | None,
    "lora_dropout": float | None,
    "bias": Literal["none", "all", "lora_only"] | None,
    "rank_pattern": dict[str, list[bool]] | None,
}
FIELDS: Final[Mapping[str, tuple[str, Any]]] = {  # ours, PEFT's, and PEFT's default
    "rank_start": ("init_r", 12),
    "rank_target": ("target_r", 8),
    "alpha": ("lora_alpha", 8.0),
    "warmup": ("tinit", 0),
    "final": ("tfinal", 0),
    "every": ("deltaT", 1),
    "beta1": ("beta1", 0.85),
    "beta2": ("beta2", 0.85),
    "orthogonality": ("orth_reg_weight", 0.5),
    "dropout": ("lora_dropout", 0.0),
    "bias": ("bias", "none"),
}


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Budgeted):
    """h = W0 x + s P Λ Q x, with P (out, r), Λ (r, r) diagonal, Q (r, in); unimportant triplets are pruned in training.

    Training starts with `rank_start` triplets a site. After `warmup` steps a budget falls along a cubic curve to
    `rank_target` triplets a site on average; every `every` steps the most important triplets of all sites are kept and
    λ of the others is set to zero. They may return: their vectors stay. In the `final` steps the choice stands.
    s = alpha / (rank_start + 1e-5), whatever the rank at the time, as in the paper's code.

    P and Q are pulled towards orthonormal vectors by `orthogonality` times the mean over all P and Q of ‖PᵀP - I‖_F,
    which is the code's form; the paper's is γ times the sum of the squares.

    Example:
        >>> AdaLoRA(rank_start=12, rank_target=8, targets="attention").rank_target
        8

    Paper: Zhang et al. 2023, https://arxiv.org/abs/2303.10512.
    """

    name: ClassVar[str] = "adalora"
    peft_type: ClassVar[str] = "ADALORA"

    rank_start: int = 12  # R; triplets of each site at the start
    rank_target: int = 8  # triplets of a site at the end, on average
    alpha: float = 32.0  # the update is scaled by alpha / rank_start
    orthogonality: float = 0.1  # weight of the mean ‖PᵀP - I‖_F of all P and Q

    def _rules(self) -> Rules:
        yield from super()._rules()
        yield whole("rank_start", self.rank_start)
        yield at_most("rank_target", self.rank_target, "rank_start", self.rank_start)
        yield "alpha", self.alpha, "above 0", self.alpha > 0
        yield "orthogonality", self.orthogonality, "at least 0", self.orthogonality >= 0

    def _placement(self, site: Site) -> Placement:
        scale = self.alpha / (self.rank_start + EPSILON)
        return Placement(site.path, site.role, LOW_RANK, site.slice, self.rank_start, self.alpha, scale, "gaussian")

    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> Triplets:
        """Room for P, Λ and Q."""
        return Triplets(placement, module, self.dropout)

    def start(self, deltas: Sequence[Delta], model: nn.Module, statistics: Mapping[Any, Any] | None) -> None:
        """P and Q from N(0, 0.02²), Λ zero: a fresh adapter is the base."""
        for delta in triplets(deltas):
            delta.refill(0, None)

    def penalty(self, deltas: Sequence[Delta]) -> Tensor | None:
        """How far P and Q are from orthonormal vectors: the mean of ‖PᵀP - I‖_F and ‖QQᵀ - I‖_F over all sites."""
        own = triplets(deltas)
        if not own or not self.orthogonality:
            return None
        device = own[0].A.device
        grams = [gram.to(device) for delta in own for gram in (delta.A @ delta.A.T, delta.B.T @ delta.B)]
        gaps = torch.stack(grams) - torch.eye(self.rank_start, device=device)
        return self.orthogonality * torch.linalg.matrix_norm(gaps).mean()

    @torch.no_grad()
    def after_step(self, deltas: Sequence[Delta], step: int, steps: int) -> None:
        """Follow the importance of every number, and now and then keep the triplets that matter most."""
        phase, own = self.phase(step, steps), triplets(deltas)
        if phase.watches:
            observe(own, self.beta1, self.beta2)
        if phase.changes:
            start, end = (rank * len(own) for rank in (self.rank_start, self.rank_target))
            share_out(own, top(importances(own), self.allowed(step, steps, start=start, end=end)))
        if phase.changes or phase.is_final:
            for delta in own:
                delta.prune()

    def to_peft(self, deltas: Sequence[Delta]) -> tuple[dict[str, Any], Tensors]:
        """PEFT's fields and tensors: the triplets that are kept; slices of a fused layer become one block."""
        tensors: Tensors = {}
        patterns, layers = {}, by_layer(deltas)
        room = self.rank_start * max(len(layer) for layer in layers.values())  # PEFT has one for all layers
        for path, layer in layers.items():
            count = held_by(layer)
            tensors |= _block(path, layer, count)
            patterns[f"{path}.lora_E"] = [number < count * len(layer) for number in range(room)]
        tinit, last = self._turns(STEPS)
        return {
            "init_r": room,
            "target_r": min(self.rank_target * room // self.rank_start, room),
            "lora_alpha": plain(self.alpha * ((room + EPSILON) / (self.rank_start + EPSILON))),
            "lora_dropout": self.dropout,
            "bias": self.bias,
            "tinit": tinit,
            "tfinal": STEPS - last,
            "deltaT": self.every,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "orth_reg_weight": self.orthogonality,
            "total_step": max(STEPS, tinit + STEPS - last + 1),
            "rank_pattern": None if all(map(all, patterns.values())) else patterns,
            "target_modules": list(layers),
            "fan_in_fan_out": any(isinstance(layer[0].layout, Conv1DLayout) for layer in layers.values()),
            "init_lora_weights": True,
        }, tensors

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Tensors, model: nn.Module) -> tuple[Self, Plan]:
        """The method of a PEFT folder; there is room for all triplets that training began with."""
        peft.refuse_misfits(config, READ)
        paths = peft.paths_of(tensors, ".lora_A")
        told = {ours: usual if config.get(key) is None else config[key] for ours, (key, usual) in FIELDS.items()}
        told["alpha"] = float(told["alpha"] if told["alpha"] > 0 else told["rank_start"])  # as PEFT has it
        told["rank_target"] = min(told["rank_target"], told["rank_start"])
        faults = [fault for path in paths for fault in _rank_faults(config, path, tensors[f"{path}.lora_A"], told)]
        if faults:
            raise BadAdapterFile("the PEFT adapter", faults)
        where = peft.targets(config.get("target_modules"), set(paths), model)
        method = cls(**told, targets=where, train=peft.trained(config, tensors))
        return method, method.plan(model)

    def read(self, deltas: Sequence[Delta], tensors: Tensors) -> list[str]:
        """Copy triplets out of `tensors` into the first places."""
        return [fault for path, layer in by_layer(deltas).items() for fault in _read(path, layer, tensors)]


class Triplets(Directions):
    """s P Λ Q of one site: Q (R, in) is `A`, P (out, R) is `B` and Λ's diagonal (R, 1) is `E`, as in PEFT."""

    def __init__(self, placement: Placement, module: nn.Module, dropout: float) -> None:
        super().__init__(placement, module, dropout)
        self.E = nn.Parameter(torch.zeros(placement.rank, 1))
        self._watch("E")

    def difference(self) -> tuple[Tensor, Tensor]:
        """Λ Q and P: s P Λ Q is the update."""
        a_RI, b_OR = self.A * self.E, self.B
        return (a_RI, b_OR) if self.training else self.ordered(a_RI, b_OR)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s P Λ Q dropout(x)."""
        return y + self.branch(x, y)

    def fold(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s P Λ Q."""
        return self.updated(weight_OI), bias_O

    def prune(self) -> None:
        """λ of the pruned is zero; their vectors stay, and the optimiser moves λ again in the next step."""
        self.E.masked_fill_(~self.kept_R[:, None], 0.0)

    def acts(self) -> Tensor:
        return self.E.flatten() != 0

    @torch.no_grad()
    def refill(self, first: int, generator: torch.Generator | None) -> None:
        """Random vectors; λ of a fresh triplet is zero."""
        if self.A.is_meta:
            return
        for vectors in (self.A[first:], self.B[:, first:]):
            vectors.copy_(STD * torch.randn(vectors.shape, generator=generator, device="cpu"))
        self.E[first:].zero_()


def triplets(deltas: Sequence[Delta]) -> list[Triplets]:
    """The method's own among deltas."""
    return [delta for delta in directions(deltas) if isinstance(delta, Triplets)]


@torch.no_grad()
def _block(path: str, layer: Sequence[Directions], count: int) -> Tensors:
    """The first K triplets of every slice of a layer, as those of one layer: Q and Λ stacked, P block by block."""
    own = [(delta, delta.order_R[:count]) for delta in triplets(layer)]
    a_KI, e_K1 = (torch.cat(each) for each in zip(*((d.A[first], d.E[first]) for d, first in own), strict=True))
    b_OK = a_KI.new_zeros(layer[0].layout.out_features, len(a_KI))
    for number, (delta, first) in enumerate(own):
        columns, part, own_OK = _places(number, count), delta.placement.slice, delta.B[:, first]
        b_OK[:, columns] = own_OK if part is None else part.put(b_OK[:, columns], own_OK, 0)
    return dict(zip((f"{path}.{name}" for name in NAMES), (a_KI, b_OK, e_K1), strict=True))


@torch.no_grad()
def _read(path: str, layer: Sequence[Directions], tensors: Tensors) -> list[str]:
    """Copy a layer's triplets into the first places of its slices."""
    stored = tensors.get(f"{path}.lora_A")
    count = told_by(layer, None if stored is None or not stored.dim() else len(stored))
    for delta in layer:
        delta.settle(count)
    block = _block(path, layer, count)
    if faults := fill(block, tensors):
        return faults
    a_KI, b_OK, e_K1 = block.values()
    for number, delta in enumerate(triplets(layer)):
        places, part = _places(number, count), delta.placement.slice
        delta.A[:count].copy_(a_KI[places])
        delta.E[:count].copy_(e_K1[places])
        delta.B[:, :count].copy_(b_OK[:, places] if part is None else part.take(b_OK[:, places], 0))
    return []


def _places(number: int, count: int) -> slice:
    return slice(number * count, (number + 1) * count)


def _rank_faults(config: Mapping[str, Any], path: str, a_KI: Tensor, told: Mapping[str, Any]) -> list[str]:
    """Whether a layer has as many triplets as the config says: those of its pattern, or all."""
    rows, room = len(a_KI) if a_KI.dim() else 0, told["rank_start"]
    pattern = (config.get("rank_pattern") or {}).get(f"{path}.lora_E")
    size, wanted = (room, room) if pattern is None else (len(pattern), sum(pattern))
    return [] if (size, wanted) == (room, rows) else [f"{path} has {rows} triplets, its config says {wanted} of {room}"]
