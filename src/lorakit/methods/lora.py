"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv:2106.09685).

Legend: B batch, T tokens, I in, O out, R rank, N adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.experts import WEIGHT
from lorakit.core.layouts import LinearLayout
from lorakit.core.plan import Placement
from lorakit.core.quick import fits_one_step, is_frozen_linear
from lorakit.kernels.low_rank import low_rank_linear
from lorakit.methods import _lora_peft as peft_format
from lorakit.methods._experts import LowRankExperts
from lorakit.methods._low_rank import Factors, LowRankMethod

_FEW_TOKENS = 16  # as while text is written: there the plain path is the quicker one


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRankMethod):
    """h = W0 x + (alpha / r) B A x, with A (r, in) random, B (out, r) zero and W0 (out, in) frozen.

    `ranks` and `alphas` give single targets a rank or alpha of their own: keys are roles, groups or globs, and the most
    specific one wins. An initialisation whose B0 A0 is not zero (`pissa`) trains s (B A - B0 A0), so the base stays as
    it is; it is saved as plain LoRA of rank 2 r. `train` names modules (a task's head) that are trained whole.

    Example:
        >>> LoRA(rank=8, alpha=16, targets=("attn.q", "attn.v"), ranks={"attn.q": 4}).rank
        8

    Paper: Hu et al. 2021, https://arxiv.org/abs/2106.09685; scaling by alpha / sqrt(r): Kalajdzievski 2023,
    https://arxiv.org/abs/2312.03732.
    """

    name: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    adapts_experts: ClassVar[bool] = True

    @classmethod
    def is_in_peft(cls, config: object) -> bool:
        """PEFT's LORA without DoRA's magnitudes."""
        return peft_format.is_lora(config, dora=False)

    def build(self, placement: Placement, module: nn.Module, shared: nn.Module | None) -> Factors:
        """Room for A and B."""
        kind = LowRank if placement.parameter == WEIGHT else LowRankExperts
        return kind(placement, module, self.dropout)


class LowRank(Factors):
    """s B A: the update of one site, of rank R."""

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s B A dropout(x)."""
        return y + self.branch(x, y)

    def is_fused(self, module: nn.Module) -> bool:
        """On a frozen `nn.Linear`, without dropout and without a start that is taken off."""
        plain = self.A0 is None and self.placement.slice is None and not (self.dropout and self.training)
        return plain and is_frozen_linear(module)

    def through(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        """`after`, with the layer's own product in one step of autograd."""
        if not self.is_fused(module) or not fits_one_step(x, y):
            return None
        if not torch.is_grad_enabled() and x.numel() <= _FEW_TOKENS * x.shape[-1]:
            return None
        return low_rank_linear(x, y, module.get_parameter("weight"), self.A, self.B, self.scale)

    def fold(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B A."""
        return self.updated(weight_OI), bias_O

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
    pairs = [None if delta is None else (*delta.difference(), delta.scale) for delta in deltas]
    some = [pair for pair in pairs if pair is not None]
    rank, (a_RI, b_OR, _) = max(len(pair[0]) for pair in some), some[0]
    none = a_RI.new_zeros(rank, a_RI.shape[1]), b_OR.new_zeros(b_OR.shape[0], rank)
    a = [none[0] if pair is None else F.pad(pair[0], (0, 0, 0, rank - len(pair[0]))) for pair in pairs]
    b = [none[1] if pair is None else F.pad(pair[1] * pair[2], (0, rank - len(pair[0]))) for pair in pairs]
    return torch.stack([*a, none[0]]).to(dtype), torch.stack([*b, none[1]]).to(dtype)
