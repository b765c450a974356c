"""Linear layers whose weight is kept in few bits and unpacked where it is used: the frozen base of QLoRA.

y = x Wᵀ + b in the dtype of x, exactly the product with the unpacked W. W is unpacked once more for the gradient of x,
so no float copy of it outlives a product. Codes and scales are plain tensors, which move, shard and pickle like others.

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314. Legend: I in, O out, N numbers of a matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakit.kernels.product import along_last


@dataclass(frozen=True)
class Packing(ABC):
    """How the numbers of a matrix W (out, in) became codes, and become numbers again."""

    shape: tuple[int, int]

    @property
    @abstractmethod
    def bits(self) -> float:
        """Bits of a number's code, scales not counted."""

    @abstractmethod
    def unpack(self, codes: Tensor, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """W (out, in) from its codes and the other tensors of the layer, in their order."""


class QuantisedLinear(nn.Linear):
    """A frozen linear layer that keeps its weight packed; `lorakit.models.quantise` puts it in a float layer's place.

    `weight` holds the codes, in one line. While an adapter is merged it holds floats, and the layer is a plain one.
    `transposed` says that the layer it stands for (GPT-2's `Conv1D`) stores W as (in, out).
    """

    like: Tensor  # nothing, in the dtype and on the device that the layer's floats would have

    def __init__(
        self,
        packing: Packing,
        codes: Tensor,
        parts: Mapping[str, Tensor],
        bias: nn.Parameter | None,
        *,
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.packing, self.transposed, self.part_names = packing, transposed, tuple(parts)
        self.out_features, self.in_features = packing.shape
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_parameter("bias", bias)
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=codes.device), persistent=False)

    @property
    def is_packed(self) -> bool:
        """Whether the weight is codes: always, but while an adapter is merged."""
        return not self.weight.is_floating_point()

    @property
    def numbers(self) -> int:
        """Numbers of the weight."""
        return self.in_features * self.out_features

    def parts(self) -> tuple[Tensor, ...]:
        """What is needed beside the codes to unpack them."""
        return tuple(self.get_buffer(name) for name in self.part_names)

    def floats(self, kept: Tensor) -> Tensor:
        """The numbers of a weight that this layer keeps, laid out as the layer that it stands for would store them."""
        if kept.is_floating_point():
            return kept
        w_OI = self.packing.unpack(kept, self.parts(), self.like.dtype)
        return w_OI.T if self.transposed else w_OI

    def forward(self, input: Tensor) -> Tensor:
        if not self.is_packed:
            return F.linear(input, self.weight.T if self.transposed else self.weight, self.bias)
        place = input.device.type
        if place != "meta" and torch.is_autocast_enabled(place):
            input = input.to(torch.get_autocast_dtype(place))
        y: Tensor = _Product.apply(input, self.packing, self.weight, *self.parts())  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        kept = f"{self.packing.bits:g} bits" if self.is_packed else "merged"
        return f"{super().extra_repr()}, {kept}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to another device, but keep the scales' dtype: they are what the base is."""
        before = self.parts()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, part in zip(self.part_names, before, strict=True):
            if self.get_buffer(name).dtype != part.dtype:
                self._buffers[name] = part.to(self.like.device)
        return self


class _Product(torch.autograd.Function):
    """x Wᵀ, keeping the packed W alone for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing, codes: Tensor, *parts: Tensor) -> Tensor:
        ctx.packing = packing
        ctx.save_for_backward(codes, *parts)
        return along_last(x, packing.unpack(codes, parts, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, *parts = ctx.saved_tensors
        gradient_x = along_last(gradient, ctx.packing.unpack(codes, tuple(parts), gradient.dtype).T)
        return gradient_x, None, None, *(None for _ in parts)


def floats_of(module: nn.Module, name: str, kept: Tensor) -> Tensor:
    """The numbers of a module's parameter: unpacked if `kept` is the codes of a quantised layer, else as it is.

    >>> floats_of(nn.Linear(2, 1), "weight", torch.ones(1, 2))
    tensor([[1., 1.]])
    """
    return module.floats(kept) if isinstance(module, QuantisedLinear) and name == "weight" else kept


def bits_of(module: nn.Module) -> float | None:
    """Bits of a number's code in a quantised layer; None of any other module."""
    return module.packing.bits if isinstance(module, QuantisedLinear) else None


def base_size(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[int, int]:
    """How many numbers these parameters of a model are, and how many bytes they take, with the scales of codes."""
    packed = {id(m.weight): m for m in model.modules() if isinstance(m, QuantisedLinear) and m.is_packed}
    layers = [packed[id(p)] for p in parameters.values() if id(p) in packed]
    numbers = sum(p.numel() for p in parameters.values() if id(p) not in packed)
    scales = sum(part.nbytes for layer in layers for part in layer.parts())
    return numbers + sum(layer.numbers for layer in layers), scales + sum(p.nbytes for p in parameters.values())
