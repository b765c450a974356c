"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al. 2024, arXiv:2402.09353).

Legend: B batch, T tokens, I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.delta import Delta
from lorakit.core.layouts import Conv2dLayout, Layout
from lorakit.core.method import Tensors
from lorakit.core.plan import Placement
from lorakit.core.quantised import floats_of
from lorakit.core.sites import ADAPTERS, Slice, weight_at
from lorakit.core.state import Adapters
from lorakit.methods import _lora_peft as peft_format
from lorakit.methods import _peft as peft
from lorakit.methods._low_rank import Factors, LowRankMethod

KEY = ".lora_magnitude_vector"


@dataclass(frozen=True, kw_only=True)
class DoRA(LowRankMethod):
    """W' = m ∘ (W0 + s B A) / ‖W0 + s B A‖: LoRA for the rows' directions, and a trained length m (out,) for each row.

    m begins as the rows' lengths ‖W0‖, so a fresh adapter is the base. The norm, one number an output unit, takes no
    part in the gradient, and is found without forming W0 + B A:
    ‖W0 + s B A‖² = ‖W0‖² + 2 s rowsum((W0 Aᵀ) ∘ B) + s² rowsum((B A Aᵀ) ∘ B).

    Example:
        >>> DoRA(rank=8, alpha=16, targets=("attn.q", "attn.v")).rank
        8

    Paper: Liu et al. 2024, https://arxiv.org/abs/2402.09353.
    """

    name: ClassVar[str] = "dora"
    peft_type: ClassVar[str] = "LORA"
    reads_base: ClassVar[bool] = True

    @classmethod
    def is_in_peft(cls, config: Mapping[str, Any]) -> bool:
        """PEFT's LORA with `use_dora`."""
        return peft_format.is_lora(config, dora=True)

    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> Decomposed:
        """Room for A, B and m."""
        return Decomposed(placement, module, self.dropout)

    def to_peft(self, deltas: Sequence[Delta]) -> tuple[dict[str, Any], Tensors]:
        """LoRA's fields and tensors, and one m a layer."""
        config, tensors = super().to_peft(deltas)
        lengths = {path + KEY: _together(group) for path, group in _by_path(deltas).items()}
        return config | {"use_dora": True}, tensors | lengths

    def read(self, deltas: Sequence[Delta], tensors: Tensors) -> list[str]:
        """Copy A, B and m out of `tensors` into the deltas."""
        faults = super().read(deltas, tensors)
        for path, group in _by_path(deltas).items():
            faults += _read(group, path + KEY, tensors)
        return faults


class Decomposed(Factors):
    """A (R, in), B (out, R) and the rows' lengths m (out,) of one site."""

    outer: ClassVar[tuple[str, ...]] = ("B", "magnitude")

    def __init__(self, placement: Placement, module: nn.Module, dropout: float = 0.0) -> None:
        super().__init__(placement, module, dropout)
        self.base = Rows(module, self.layout, placement.slice)
        self.magnitude = nn.Parameter(torch.zeros(len(self.B)))

    @torch.no_grad()
    def start(self, module: nn.Module, statistics: Mapping[Any, Any] | None) -> None:
        """A and B as the initialisation says; m by the very expression of the norm, so that their ratio is 1."""
        super().start(module, statistics)
        lengths_O = self.lengths(*self.difference())
        if not lengths_O.is_meta:
            self.magnitude.copy_(lengths_O)

    def lengths(self, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """‖W + s B A‖ of each row (out,), in float32 at least, from ‖W‖², W Aᵀ and A Aᵀ; no part of any gradient."""
        weight_OI, squares_O = self.base.weight(), self.base.squares()
        a_RI, b_OR = a_RI.detach().to(squares_O), b_OR.detach().to(squares_O)
        with nullcontext() if weight_OI.is_meta else torch.autocast(weight_OI.device.type, enabled=False):
            low_OR = F.linear(weight_OI.to(squares_O), a_RI)
            low_OR = torch.addmm(low_OR, b_OR, a_RI @ a_RI.T, beta=2, alpha=self.scale)
            found_O = torch.add(squares_O, torch.linalg.vecdot(low_OR, b_OR), alpha=self.scale)
        return _at_least_tiny(found_O.clamp_min(0).sqrt())

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y + (m / n - 1) (y - b) + (m / n) s B A x with n = ‖W + s B A‖; dropout, if any, acts on x in both terms."""
        a_RI, b_OR = self.difference()
        gain_O = self.magnitude / self.lengths(a_RI, b_OR)
        excess_O, b_OR = gain_O - 1, b_OR * (gain_O * self.scale)[:, None]
        own, shift_O = self._own(y, excess_O)
        drop = self.dropout if self.training else 0.0
        if drop and not self.layout.lookup:
            x = F.dropout(x, drop)
            own, shift_O = self.layout.project(x, self.base.weight().to(y.dtype)), None
        low = self.layout.project(x, a_RI.to(y.dtype))
        if drop and self.layout.lookup:
            low = F.dropout(low, drop)
        change = self.layout.lift(low, b_OR.to(y.dtype), shift_O).to(y.dtype)
        return torch.addcmul(y + change, own, self.layout.along_output(excess_O.to(y.dtype)))

    def _own(self, y: Tensor, excess_O: Tensor) -> tuple[Tensor, Tensor | None]:
        """What stands for W x: y, and what has to be added where y holds the bias too."""
        bias_O = self.base.bias()
        return y, None if bias_O is None else -(excess_O * bias_O).to(y.dtype)

    def fold(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """m (W + s B A) / ‖W + s B A‖; the bias stays."""
        new_OI = self.updated(weight_OI)
        lengths_O = _at_least_tiny(torch.linalg.vector_norm(new_OI, dim=1))
        return new_OI * (self.magnitude.to(new_OI) / lengths_O)[:, None], bias_O

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The layer's weight is about to be moved or cast as well."""
        self.base.forget()
        return super()._apply(fn, recurse)


def _at_least_tiny(lengths_O: Tensor) -> Tensor:
    """A row of zeros stays one (its m is 0) instead of becoming NaN."""
    return lengths_O.clamp_min(torch.finfo(torch.float32).tiny)


class Rows:
    """The rows of a live layer that a site has: its weight, its bias, and ‖W‖² of each row, found once for a weight.

    No module: the layer is not a child of its adapter. A weight that is written to, moved, cast or replaced gets its
    norms anew, and so does every copy of this.
    """

    def __init__(self, module: nn.Module, layout: Layout, part: Slice | None) -> None:
        self.module, self.layout, self.part = module, layout, part
        self._seen: tuple[Tensor, int, Tensor] | None = None  # the weight, its version, and ‖W‖²

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_seen": None}

    def weight(self) -> Tensor:
        """W (out, in), detached; a view where it can be one, and not kept where it has to be unpacked."""
        return weight_at(self.module, self.part)

    def bias(self) -> Tensor | None:
        """The bias (out,), detached."""
        bias_O = None if self.layout.lookup else cast(Tensor | None, self.module.bias)
        if bias_O is None or self.part is None:
            return None if bias_O is None else bias_O.detach()
        return self.part.take(bias_O.detach())

    def squares(self) -> Tensor:
        """‖W‖² of each row (out,), in float32 at least."""
        weight = cast(Tensor, self.module.weight)
        if torch.compiler.is_compiling() or weight.is_inference():
            return _squares(self.weight())
        if self._seen is None or not _is_same(weight, *self._seen[:2]):
            self._seen = weight.detach(), weight._version, _squares(self.weight())
        return self._seen[2]

    def forget(self) -> None:
        """Find the norms anew next time."""
        self._seen = None

    def all_lengths(self) -> Tensor:
        """‖W‖ of every row of the whole layer, of its own weight even while something is merged into it."""
        weight, adapters = cast(nn.Parameter, self.module.weight), self.module._modules.get(ADAPTERS)
        own = adapters.state.original(weight) if isinstance(adapters, Adapters) else weight
        return _squares(self.layout.matrix(floats_of(self.module, "weight", own.detach()))).sqrt()


def _squares(weight_OI: Tensor) -> Tensor:
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    return torch.linalg.vector_norm(weight_OI, dim=1, dtype=dtype).square()


def _is_same(weight: Tensor, seen: Tensor, version: int) -> bool:
    """Whether a weight is the one seen before; as that one is kept, no other can have its memory."""
    return weight.data_ptr() == seen.data_ptr() and weight._version == version and weight.dtype == seen.dtype


def _by_path(deltas: Sequence[Delta]) -> dict[str, list[Decomposed]]:
    return peft.by_path([delta for delta in deltas if isinstance(delta, Decomposed)])


def _shape(delta: Decomposed) -> tuple[int, ...]:
    width = delta.layout.out_features
    return (1, width, 1, 1) if isinstance(delta.layout, Conv2dLayout) else (width,)


def _together(group: list[Decomposed]) -> Tensor:
    """m of the whole layer; rows that no slice has keep the length they have."""
    first = group[0]
    if first.placement.slice is None:
        return first.magnitude.detach().reshape(_shape(first))
    whole_O = first.base.all_lengths().to(first.magnitude)
    for delta in group:
        whole_O = cast(Slice, delta.placement.slice).put(whole_O, delta.magnitude.detach())
    return whole_O


@torch.no_grad()
def _read(group: list[Decomposed], key: str, tensors: Tensors) -> list[str]:
    found, faults = peft.taken({key: _shape(group[0])}, tensors)
    for delta in () if faults else group:
        part, value = delta.placement.slice, found[key].flatten()
        delta.magnitude.copy_(value if part is None else part.take(value))
    return faults
