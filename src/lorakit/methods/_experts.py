"""Low-rank updates of stacked experts: y_e = W_e x + s B_e A_e x, inside whatever forward the experts have.

While a module of experts runs, a stand-in takes the place of its parameter. It answers the few operations by which
experts are computed (one expert at a time, in groups, in batches) with the base's own operation and a low-rank one
beside it, so W_e + s B_e A_e is never formed and the base's code is used as it is.

Legend: E experts, S pairs of a token and an expert of its, I in, O out, R rank. However a parameter lies, `left` and
`right` are the factors of its update in that shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.experts import experts_of
from lorakit.core.initialise import Initialisation
from lorakit.core.plan import Placement
from lorakit.core.statistics import SiteStatistics
from lorakit.errors import BadMethod
from lorakit.methods._low_rank import Factors

GROUPED_RANK = 8  # grouped products want rows of a multiple of 16 bytes


@final
class LowRankExperts(Factors):
    """s B_e A_e for every expert e of one parameter: A (E, R, in), B (E, out, R)."""

    stacked: ClassVar[bool] = True
    per_row = False  # the experts see the tokens of all rows as one list

    def __init__(self, placement: Placement, module: nn.Module, dropout: float = 0.0) -> None:
        super().__init__(placement, module, dropout)
        self.experts = experts_of(module)[placement.parameter]

    def first(
        self, init: Initialisation, module: nn.Module, statistics: SiteStatistics | None
    ) -> tuple[Tensor, Tensor]:
        """The initialisation's factors of each expert by itself."""
        place = self.placement
        w_EOI = self._rows(self.experts.matrices(module.get_parameter(place.parameter).detach()))
        pairs = [init.factors(w_OI, place.rank, statistics, place.path) for w_OI in w_EOI]
        return torch.stack([a_RI for a_RI, _ in pairs]), torch.stack([b_OR for _, b_OR in pairs])

    def _rows(self, w_EOI: Tensor) -> Tensor:
        part = self.placement.slice
        return w_EOI if part is None else part.take(w_EOI, -2)

    def act(self, x: Tensor, y: Tensor, inserted_BT: Tensor | None) -> Tensor:
        """The output as it is: the update is in it."""
        return y

    def enter(self, module: nn.Module, share: Tensor | None = None) -> None:
        """Put the stand-in in, or add to the one of another delta."""
        name, (a_ERI, b_EOR) = self.placement.parameter, self.difference()
        present = module._parameters[name]
        b_EOR = b_EOR * (self.scale if share is None else self.scale * share)
        part = self.placement.slice
        if part is not None:
            whole_EOR = b_EOR.new_zeros(self.experts.count, self.experts.out_features, b_EOR.shape[-1])
            b_EOR = part.put(whole_EOR, b_EOR, -2)
        pair = (a_ERI.mT, b_EOR.mT) if self.experts.transposed else (b_EOR, a_ERI)
        dropout = self.dropout if self.training else 0.0
        changed = Unformed.of(cast(Tensor, present), self.placement.path, pair, dropout)
        module._parameters[name] = cast(nn.Parameter, changed)

    def leave(self, module: nn.Module) -> None:
        """Put the base's parameter back."""
        present = module._parameters[self.placement.parameter]
        if isinstance(present, Unformed):
            module._parameters[self.placement.parameter] = cast(nn.Parameter, present.parts.base)

    def weights(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameter, by its own name."""
        return {self.placement.parameter: module.get_parameter(self.placement.parameter)}

    def merged(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W_e + s B_e A_e for every expert."""
        name, part = self.placement.parameter, self.placement.slice
        w_EOI, (a_ERI, b_EOR) = self.experts.matrices(values[name]), self.difference()
        new_EOI = torch.baddbmm(self._rows(w_EOI), b_EOR.to(w_EOI), a_ERI.to(w_EOI), alpha=self.scale)
        new_EOI = new_EOI if part is None else part.put(w_EOI, new_EOI, -2)
        return {name: self.experts.stored(new_EOI)}


class UnformedSum(NamedTuple):
    """What a stand-in stands for: base + left @ right; `base` is the parameter, or what was taken of it."""

    base: Tensor
    left: Tensor
    right: Tensor
    dropout: float  # of the update's input
    path: str

    def of(self, change: Callable[[Tensor], Tensor]) -> Unformed:
        """The same operation on all three, such as the choice of an expert."""
        return Unformed.made(self._replace(base=change(self.base), left=change(self.left), right=change(self.right)))

    def dropped(self, x: Tensor) -> Tensor:
        """The update's input."""
        return F.dropout(x, self.dropout) if self.dropout else x


@final
class Unformed(Tensor):
    """Stands for base + left @ right without forming it.

    It has the base's shape but no values (its own memory is on the meta device): code that does not ask it fails rather
    than leave the update out. Of several deltas of one parameter, the first tells the dropout.
    """

    parts: UnformedSum

    @classmethod
    def of(cls, present: Tensor, path: str, pair: tuple[Tensor, Tensor], dropout: float) -> Self:
        """Stand in for a parameter, or for one that is stood in for already."""
        if not isinstance(present, Unformed):
            left, right = (factor.to(present.dtype) for factor in pair)
            return cls.made(UnformedSum(present, left, right, dropout, path))
        old = present.parts
        left, right = (factor.to(old.base.dtype) for factor in pair)
        return cls.made(old._replace(left=torch.cat([old.left, left], -1), right=torch.cat([old.right, right], -2)))

    @classmethod
    def made(cls, parts: UnformedSum) -> Self:
        """A stand-in for these parts."""
        found = torch.empty_like(parts.base, device="meta").as_subclass(cls)
        found.parts = parts
        return found

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        if name in RULES:
            return RULES[name](func, *args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            fact = func(*args, **(kwargs or {}))
        if isinstance(fact, Tensor) and name != "_base":
            raise _refusal(next(each for each in (*args, *(kwargs or {}).values()) if isinstance(each, Unformed)), name)
        return fact


def _refusal(changed: Unformed, what: str) -> BadMethod:
    return BadMethod(
        f"{changed.parts.path} computes its experts by {what}, in which an adapter on them cannot take part; choose "
        "another way, model.set_experts_implementation('grouped_mm'), or merge the adapter"
    )


def _told(func: Any, changed: Unformed) -> Any:
    """Where the base's parameter is."""
    return func(changed.parts.base)


def _taken(func: Any, changed: Unformed, index: Any) -> Unformed:
    """One expert, or one for each token."""
    if not isinstance(index, int | Tensor):
        raise _refusal(changed, f"the part {index}")
    return changed.parts.of(lambda each: each[index])


def _turned(func: Any, changed: Unformed, one: int, other: int) -> Unformed:
    """(base + left right)^T = base^T + right^T left^T."""
    parts, last = changed.parts, changed.parts.base.dim() - 1
    if {one % (last + 1), other % (last + 1)} != {last - 1, last}:
        raise _refusal(changed, f"transpose({one}, {other})")
    return Unformed.made(parts._replace(base=parts.base.mT, left=parts.right.mT, right=parts.left.mT))


def _linear(func: Any, x_SI: Tensor, changed: Unformed, bias_O: Tensor | None = None) -> Tensor:
    """x (base + left right)^T."""
    parts = changed.parts
    low_SR = F.linear(parts.dropped(x_SI), parts.right)
    return F.linear(x_SI, parts.base, bias_O) + F.linear(low_SR, parts.left)


def _product(func: Any, one: Any, other: Any) -> Tensor:
    """x (base + left right), or (base + left right) x."""
    if isinstance(other, Unformed):
        parts = other.parts
        return cast(Tensor, func(one, parts.base) + func(func(parts.dropped(one), parts.left), parts.right))
    parts = one.parts
    return cast(Tensor, func(parts.base, other) + func(parts.left, func(parts.right, parts.dropped(other))))


def _grouped(func: Any, x_SI: Tensor, changed: Unformed, offs: Tensor | None = None, **rest: Any) -> Tensor:
    """x (base + left right), where each stretch of tokens has its own expert."""
    parts = changed.parts
    more = -parts.left.shape[-1] % GROUPED_RANK
    left, right = F.pad(parts.left, (0, more)), F.pad(parts.right, (0, 0, 0, more))
    low_SR = func(parts.dropped(x_SI), left, offs=offs)
    return cast(Tensor, func(x_SI, parts.base, offs=offs, **rest) + func(low_SR, right, offs=offs))


RULES: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(("device", "is_cpu", "is_cuda"), _told),
    **{"__getitem__": _taken, "transpose": _turned, "linear": _linear},
    **dict.fromkeys(("bmm", "matmul", "__matmul__"), _product),
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped),
}
