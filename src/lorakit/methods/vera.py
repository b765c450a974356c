"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al. 2023, arXiv:2310.11454).

Legend: B batch, T tokens, I in, O out, R rank; max(I), max(O) are the largest among the adapted sites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.layouts import Conv1DLayout, Layout
from lorakit.core.method import Rules, Tensors
from lorakit.core.plan import Placement, Plan
from lorakit.core.sites import Site, Slice
from lorakit.errors import BadAdapterFile, BadMethod
from lorakit.methods import _peft as peft
from lorakit.methods._linear import linear_layout, linear_sites, out_features
from lorakit.methods._targeted import Targeted, share, whole

KIND = "scaled-projection"
ROOT, A, B = "base_model.", "vera_A", "vera_B"  # the file has them under PEFT's root, with no layer's path
D_ENDING, B_ENDING = ".vera_lambda_d", ".vera_lambda_b"
READ = {
    "r": int | None,
    "projection_prng_key": int | None,
    "save_projection": bool | None,
    "vera_dropout": float | None,
    "d_initial": float | None,
}


@dataclass(frozen=True, kw_only=True)
class VeRA(Targeted):
    """h = W0 x + b ∘ B (d ∘ A x), with A (R, max in) and B (max out, R) random, frozen and shared by all sites.

    Trained are d (R,) and b (out,) of each site; b begins at zero, so that a fresh adapter is the base. A site takes
    the first columns of A and the first rows of B. The same seed gives the same A and B.

    Example:
        >>> VeRA(rank=1024, targets=("attn.q", "attn.v")).d_initial
        0.1

    Paper: Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454.
    """

    name: ClassVar[str] = "vera"
    kinds: ClassVar[tuple[str, ...]] = (KIND,)
    peft_type: ClassVar[str] = "VERA"

    rank: int = 256  # R; rows of A, columns of B
    d_initial: float = 0.1  # where every entry of d begins
    seed: int = 0  # of the random A and B
    dropout: float = 0.0  # on the branch's input
    save_projection: bool = True  # write A and B to the file, too; without, they are drawn again from the seed

    def _rules(self) -> Rules:
        yield from super()._rules()
        yield whole("rank", self.rank)
        yield whole("seed", self.seed, 0)
        yield share("dropout", self.dropout)

    def sites(self, model: nn.Module) -> list[Site]:
        """The targets' linear layers."""
        return linear_sites(self.name, model, self.targets)

    def places(self, model: nn.Module, statistics: Mapping[Any, Any] | None) -> Sequence[Placement]:
        """One pair of vectors a site."""
        return [Placement(site.path, site.role, KIND, site.slice, self.rank) for site in self.sites(model)]

    def shared(self, plan: Plan, model: nn.Module) -> nn.Module | None:
        """A and B, as large as the largest site needs."""
        own = [placement for placement in plan if not placement.is_replaced]
        layouts = [linear_layout(placement, model.get_submodule(placement.path)) for placement in own]
        if not own:
            return None
        widest = max(out_features(placement, layout) for placement, layout in zip(own, layouts, strict=True))
        rank = max(placement.rank for placement in own)
        return Projections(rank, max(layout.in_features for layout in layouts), widest, self.seed)

    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> ScaledProjection:
        """Room for d and b."""
        return ScaledProjection(placement, linear_layout(placement, module), cast(Projections, shared), self.dropout)

    def start(self, deltas: Sequence[Delta], model: nn.Module, statistics: Mapping[Any, Any] | None) -> None:
        """d is `d_initial` everywhere, b zero."""
        for delta in _own(deltas):
            nn.init.constant_(delta.d, self.d_initial)

    def to_peft(self, deltas: Sequence[Delta]) -> tuple[dict[str, Any], Tensors]:
        """PEFT's fields and tensors; slices of fused layers take a block of A and B each."""
        own = _own(deltas)
        blocks = _blocks(own)
        written = self.save_projection or len(blocks) > 1 or blocks[0] is not None
        config = {
            "r": self.rank * len(blocks),
            "target_modules": list(peft.by_path(own)),
            "projection_prng_key": self.seed,
            "save_projection": written,
            "vera_dropout": self.dropout,
            "d_initial": self.d_initial,
            "bias": "none",
            "fan_in_fan_out": any(isinstance(delta.layout, Conv1DLayout) for delta in own),
            "init_weights": True,
        }
        tensors = _projections(own, blocks) if written else {}
        for path, group in peft.by_path(own).items():
            tensors |= _vectors(path, group, blocks)
        return config, tensors

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Tensors, model: nn.Module) -> tuple[Self, Plan]:
        """The method of a PEFT folder; its rank is the length of d."""
        peft.refuse_misfits(config, READ)
        paths = peft.paths_of(tensors, D_ENDING)
        ranks = {tensors[path + D_ENDING].numel() for path in paths}
        told = config.get("r", 256)
        if ranks != {told}:
            fault = f"its vectors have the ranks {sorted(ranks)}, but its config says {told}"
            raise BadAdapterFile("the PEFT adapter", [fault])
        if config.get("save_projection", True) and not {A, B} <= tensors.keys():
            raise BadAdapterFile("the PEFT adapter", [f"its config says that it holds {A} and {B}, but it does not"])
        method = cls(
            rank=told,
            targets=peft.targets(config.get("target_modules"), set(paths), model),
            d_initial=float(config.get("d_initial", 0.1)),
            seed=config.get("projection_prng_key") or 0,
            dropout=float(config.get("vera_dropout") or 0.0),
            save_projection=bool(config.get("save_projection", True)),
            train=peft.trained(config, tensors),
        )
        return method, method.plan(model)

    def read(self, deltas: Sequence[Delta], tensors: Tensors) -> list[str]:
        """Copy A, B (where the file has them), d and b out of `tensors`."""
        own = _own(deltas)
        blocks, faults = _blocks(own), []
        for name in {A, B} & {key.removeprefix(ROOT) for key in tensors}:
            tensors[name] = tensors.pop(name if name in tensors else ROOT + name)
        if A in tensors or B in tensors:
            faults += _read_projections(own, blocks, tensors)
        for path, group in peft.by_path(own).items():
            faults += _read_vectors(path, group, blocks, tensors)
        return faults


class Projections(nn.Module):
    """A (R, max in) and B (max out, R), uniform on ±√(6 / fan in): PEFT draws the same numbers from the same seed."""

    A: Tensor
    B: Tensor

    def __init__(self, rank: int, widest_in: int, widest_out: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("A", _drawn(rank, widest_in, generator), persistent=False)  # each delta would save them
        self.register_buffer("B", _drawn(widest_out, rank, generator), persistent=False)


def _drawn(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    value = torch.empty(rows, columns)
    bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(columns))
    return value if value.is_meta else value.uniform_(-bound, bound, generator=generator)


class ScaledProjection(Delta):
    """d (R,) and b (out,) of one site, beside the A and B that all sites share."""

    layout: Layout

    def __init__(self, placement: Placement, layout: Layout, projections: Projections, dropout: float) -> None:
        super().__init__(placement, layout)
        if placement.rank < 1:  # a file may tell anything
            raise BadMethod(f"{placement.path} has the rank {placement.rank}; it needs at least 1")
        self.projections, self.dropout = projections, dropout
        self.d = nn.Parameter(torch.zeros(placement.rank))
        self.b = nn.Parameter(torch.zeros(out_features(placement, layout)))

    def pair(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The site's part of A (R, in) and of B (out, R), in the dtype and on the device of `like`."""
        rank, shared = len(self.d), self.projections
        return shared.A[:rank, : self.layout.in_features].to(like), shared.B[: len(self.b), :rank].to(like)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y + b ∘ B (d ∘ A dropout(x))."""
        a_RI, b_OR = self.pair(y)
        x = F.dropout(x, self.dropout) if self.dropout and self.training else x
        lifted = F.linear(F.linear(x, a_RI) * self.d.to(y.dtype), b_OR).to(y.dtype)
        return torch.addcmul(y, lifted, self.b.to(y.dtype))

    def fold(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + diag(b) B diag(d) A."""
        a_RI, b_OR = self.pair(weight_OI)
        d_R, b_O = self.d.to(weight_OI), self.b.to(weight_OI)
        return torch.addmm(weight_OI, b_O[:, None] * b_OR, d_R[:, None] * a_RI), bias_O


def _own(deltas: Sequence[Delta]) -> list[ScaledProjection]:
    found = [delta for delta in deltas if isinstance(delta, ScaledProjection)]
    return sorted(found, key=lambda delta: delta.placement.path)  # stable: slices keep the plan's order


def _blocks(own: list[ScaledProjection]) -> list[Slice | None]:
    """Every slice of a layer that is adapted apart (None: a whole layer).

    PEFT has one d a layer. Slices with a d each are to it one layer of a larger rank, [d₁; d₂], where the shared B
    holds a block of columns for each of them that is zero in the rows of the others.
    """
    return list(dict.fromkeys(delta.placement.slice for delta in own))


def _projections(own: list[ScaledProjection], blocks: list[Slice | None]) -> Tensors:
    shared, height = own[0].projections, max(delta.layout.out_features for delta in own)
    b_OR = torch.cat([_block(shared.B, part, height) for part in blocks], 1)
    return {ROOT + A: shared.A.repeat(len(blocks), 1), ROOT + B: b_OR}


def _block(b_OR: Tensor, part: Slice | None, height: int) -> Tensor:
    """The columns of PEFT's B for one slice, (height, R)."""
    if part is not None:
        whole_OR = b_OR.new_zeros(part.stride * part.count, b_OR.shape[1])
        b_OR = part.put(whole_OR, b_OR[: part.width], 0)
    return F.pad(b_OR, (0, 0, 0, height - len(b_OR)))


def _vectors(path: str, group: list[ScaledProjection], blocks: list[Slice | None]) -> Tensors:
    d = {delta.placement.slice: delta.d.detach() for delta in group}
    nothing_R = torch.zeros_like(group[0].d)
    whole_O = group[0].b.detach().new_zeros(group[0].layout.out_features)
    for delta in group:
        part = delta.placement.slice
        whole_O = delta.b.detach() if part is None else part.put(whole_O, delta.b.detach())
    return {path + D_ENDING: torch.cat([d.get(part, nothing_R) for part in blocks]), path + B_ENDING: whole_O}


@torch.no_grad()
def _read_projections(own: list[ScaledProjection], blocks: list[Slice | None], tensors: Tensors) -> list[str]:
    shared = own[0].projections
    height, rank = max(delta.layout.out_features for delta in own), len(shared.A)
    needed = {A: (rank * len(blocks), shared.A.shape[1]), B: (height, rank * len(blocks))}
    found, faults = peft.taken(needed, tensors)
    if not faults:
        widest = max(own, key=lambda delta: len(delta.b)).placement.slice
        at = blocks.index(widest) * rank
        columns = found[B][:, at : at + rank]
        shared.A.copy_(found[A][:rank])
        shared.B.copy_(columns[: len(shared.B)] if widest is None else _rows_of(columns, widest))
    return faults


def _rows_of(columns: Tensor, part: Slice) -> Tensor:
    return part.take(columns[: part.stride * part.count], 0)


@torch.no_grad()
def _read_vectors(path: str, group: list[ScaledProjection], blocks: list[Slice | None], tensors: Tensors) -> list[str]:
    rank = len(group[0].d)
    needed = {path + D_ENDING: (rank * len(blocks),), path + B_ENDING: (group[0].layout.out_features,)}
    found, faults = peft.taken(needed, tensors)
    for delta in () if faults else group:
        part, at = delta.placement.slice, blocks.index(delta.placement.slice) * rank
        delta.d.copy_(found[path + D_ENDING][at : at + rank])
        delta.b.copy_(found[path + B_ENDING] if part is None else part.take(found[path + B_ENDING]))
    return faults
