"""An adapter between formats: what its file holds, whatever wrote it, before any model is there.

Legend: R rank, I in, O out, E experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lorakit.core.patterns import residual
from lorakit.core.sites import Slice
from lorakit.core.values import Value
from lorakit.errors import BadAdapterFile

Form = Literal["linear", "embedding", "convolution", "experts"]


@dataclass(frozen=True, eq=False)
class Update:
    """ΔW = scale · B A of one layer, as its file holds it.

    A is (R, in), of a convolution (R, in, height, width), of an embedding (R, vocabulary); B is (out, R), of a
    convolution (out, R, 1, 1), of an embedding (dimension, R). Those of E stacked experts are (E, R, in) and
    (E, out, R), and `path` ends in the name of their parameter.
    """

    path: str  # of the module in the base, without any format's prefix
    a: Value
    b: Value
    alpha: float
    rooted: bool = False  # whether the scale is alpha / sqrt(R) rather than alpha / R
    form: Form = "linear"
    magnitude: Value | None = None  # DoRA's, (out,), of a convolution (1, out, 1, 1)
    shift: Value | None = None  # a bias of B, (out,): the output gets scale · shift
    diagonal: Value | None = None  # AdaLoRA's Λ, (R, 1): ΔW = scale · B Λ A
    slices: tuple[Part, ...] = ()  # what a fused layer's roles have of it, where the file tells

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[1] if self.form == "experts" else self.a.shape[0]

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rooted else self.rank)

    @property
    def sides(self) -> tuple[int, int]:
        """(out, in) of the matrix, or of each expert's."""
        if self.form == "experts":
            return self.b.shape[1], self.a.shape[2]
        return self.b.shape[0], math.prod(self.a.shape[1:])

    @property
    def values(self) -> tuple[Value, ...]:
        """All its tensors."""
        return tuple(v for v in (self.a, self.b, self.magnitude, self.shift, self.diagonal) if v is not None)


@dataclass(frozen=True)
class Part:
    """A role's share of a fused layer: rows of A (and columns of B) from `start`, output units of `where`."""

    role: str
    where: Slice
    start: int
    rank: int


@dataclass(frozen=True, eq=False)
class Exchange:
    """An adapter's updates, and what it holds besides."""

    format: str  # what wrote it, by the name of the file in interop/formats
    updates: tuple[Update, ...]
    whole: Mapping[str, Value] = field(default_factory=dict)  # tensors in place of the base's own, by their names there
    base: str | None = None  # the name of the base that it says it belongs to
    task: str | None = None  # PEFT's word for what the model does
    config: Mapping[str, Any] = field(default_factory=dict)  # as it stands in the file, where there is one
    header: Mapping[str, Any] | None = None  # lorakit's own, where it wrote the file

    @property
    def values(self) -> Iterator[Value]:
        """Every tensor."""
        yield from (value for update in self.updates for value in update.values)
        yield from self.whole.values()


@dataclass(frozen=True, eq=False)
class Factored:
    """The update of one matrix as numbers: ΔW (out, in) = B A, the scale being in B.

    A fused layer's roles, and each of stacked experts, are matrices of their own.
    """

    name: str  # unique in its adapter: the path, with [role] or [expert] where the path has several
    path: str
    role: str
    layer: int | None
    rank: int
    shape: tuple[int, int]  # (out, in)
    read: Callable[[], tuple[Tensor, Tensor]]  # A (R, in) and B (out, R) in float32
    lost: float = 0.0  # the share of ‖ΔW‖_F that the factors leave out, where they are an approximation
    cut: Callable[[Tensor], Tensor] = lambda whole: whole  # this matrix out of the layer's W (…, out, in)


def factored(exchange: Exchange, *, where: object = "the adapter") -> list[Factored]:
    """The matrices that an adapter changes, in the order of its layers.

    Raises:
        BadAdapterFile: it has no low-rank updates, or such that are not additive (DoRA), or of a rank above the matrix.
    """
    faults = residual(exchange.config) + ([] if exchange.updates else ["it has no low-rank updates"])
    found: list[Factored] = []
    for update in exchange.updates:
        faults += _faults(update)
        found += [] if faults else list(_matrices(update, where))
    if faults:
        raise BadAdapterFile(where, faults)
    return sorted(found, key=lambda each: (each.layer is None, each.layer or 0))


def _faults(update: Update) -> Iterator[str]:
    if update.magnitude is not None:
        yield f"{update.path} is DoRA's, whose change of W depends on W; merge it and compare the two models"
    out, inner = update.sides
    if update.rank > min(out, inner):
        yield f"{update.path} has rank {update.rank}, more than its matrix of {out} x {inner} can have"


def _matrices(update: Update, where: object) -> Iterator[Factored]:
    if update.form == "experts":
        for expert in range(update.a.shape[0]):
            yield _one(update, where, f"[{expert}]", expert=expert)
    elif update.slices:
        for part in update.slices:
            yield _one(update, where, f"[{part.role}]", part=part)
    else:
        yield _one(update, where, "")


def _one(update: Update, where: object, mark: str, *, expert: int | None = None, part: Part | None = None) -> Factored:
    def read() -> tuple[Tensor, Tensor]:
        a, b = _real(update.a, update.path, where), _real(update.b, update.path, where)
        if expert is None:
            a_RI, b_OR = a.flatten(1), b.flatten(1)
        else:
            a_RI, b_OR = a[expert], b[expert]
        if update.diagonal is not None:
            a_RI = a_RI * _real(update.diagonal, update.path, where)
        if part is not None:
            own = slice(part.start, part.start + part.rank)
            a_RI, b_OR = a_RI[own], part.where.take(b_OR[:, own], 0)
        return a_RI, b_OR * update.scale

    def cut(whole: Tensor) -> Tensor:
        if expert is not None:
            return whole[expert]
        return whole if part is None else part.where.take(whole, 0)

    out, inner = update.sides
    out, rank = (part.where.width, part.rank) if part else (out, update.rank)
    role = part.role if part else role_of(update.path)
    name, layer = f"{update.path}{mark}", layer_of(update.path)
    return Factored(name, update.path, role, layer, rank, (out, inner), read, cut=cut)


def _real(value: Value, path: str, where: object) -> Tensor:
    found = value.read().float()
    if not bool(torch.isfinite(found).all()):
        raise BadAdapterFile(where, [f"{path} holds values that are not finite real numbers"])
    return found


def layer_of(path: str) -> int | None:
    """The number of the layer that a path lies in, where it tells one.

    >>> layer_of("model.layers.3.self_attn.q_proj"), layer_of("classifier")
    (3, None)
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found[1]) if found else None


def role_of(path: str) -> str:
    """What a layer is called in its block: the path after the layer's number.

    >>> role_of("model.layers.3.self_attn.q_proj"), role_of("lm_head")
    ('self_attn.q_proj', 'lm_head')
    """
    found = re.search(r"(?:^|\.)\d+\.(.+)$", path)
    return found[1] if found else path.rsplit(".", 1)[-1]
