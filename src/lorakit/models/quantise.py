"""Keep a base's linear layers in 4 or 8 bits (QLoRA: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

Int8 is a code and a scale a row, in PyTorch alone. Int4 is NormalFloat4 with doubly quantised scales, by bitsandbytes'
functions; its layers are not used: on some CPUs they rewrite their codes, and in 8 bits they round activations too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lorakit.core.layouts import Conv1DLayout, LinearLayout, layout_of
from lorakit.core.quantised import Packing, QuantisedLinear
from lorakit.core.sites import matching, sites_of, weight_at
from lorakit.core.state import state_or_new
from lorakit.errors import BadModel, BadState, MissingPackage

Width = Literal["int8", "int4"]
Quantise = Literal["none", "int8", "int4", "gguf"]
Packed = tuple[Packing, Tensor, dict[str, Tensor]]  # how, the codes, and what else unpacks them
BLOCK = 64  # numbers that share a scale
OUTER = 256  # scales that share a scale of theirs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Int8(Packing):
    """Whole numbers of -127 to 127 times a scale for each row."""

    @property
    def bits(self) -> float:
        return 8

    def unpack(self, codes: Tensor, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        (scale_O1,) = parts
        return (codes.view(self.shape) * scale_O1).to(dtype)


@dataclass(frozen=True)
class Float4(Packing):
    """Two 4-bit codes a byte; the scale of a block is a float, or a code itself.

    The numbers lie in rows of a block each: bitsandbytes' kernel for CPUs misreads rows of other lengths.
    """

    kind: str = "nf4"  # or fp4
    block: int = BLOCK

    @property
    def bits(self) -> float:
        return 4

    def unpack(self, codes: Tensor, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        import bitsandbytes as library

        functional: Any = library.functional
        scales, *outer = parts
        if outer:
            scale, code, offset = outer
            scales = functional.dequantize_blockwise(scales, absmax=scale, code=code, blocksize=OUTER) + offset
        kept = dtype if dtype.itemsize <= 4 else torch.float32
        how = functional.QuantState(
            absmax=scales, shape=(len(scales), self.block), dtype=kept, blocksize=self.block, quant_type=self.kind
        )
        numbers = functional.dequantize_4bit(codes.view(torch.uint8).view(-1, 1), how)
        return numbers.view(-1)[: self.shape[0] * self.shape[1]].view(self.shape).to(dtype)


def bitsandbytes() -> Any:
    """The functions of bitsandbytes.

    Raises:
        MissingPackage: it is not installed.
    """
    notices = logging.getLogger("bitsandbytes.backends.cpu.ops")  # at import, of a kernel that is not used here
    level = notices.level
    try:
        notices.setLevel(logging.ERROR)
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise MissingPackage("4-bit weights need bitsandbytes; install it with: pip install bitsandbytes") from error
    finally:
        notices.setLevel(level)
    return functional


def to_int8(w_OI: Tensor) -> Packed:
    """Codes and scales of a matrix in 8 bits."""
    w_OI = w_OI.float()
    scale_O1 = (w_OI.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (w_OI / scale_O1).round().to(torch.int8)
    return Int8(sides(w_OI)), codes.reshape(-1), {"scale": scale_O1}


def to_int4(w_OI: Tensor) -> Packed:
    """Codes and scales of a matrix in 4 bits."""
    numbers = pad(w_OI.reshape(-1), (0, -w_OI.numel() % BLOCK)).view(-1, BLOCK)
    if numbers.is_meta:
        return Float4(sides(w_OI)), *_without_values(len(numbers))
    codes, how = bitsandbytes().quantize_4bit(numbers, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    outer = {"outer_scale": how.state2.absmax, "outer_code": how.state2.code, "offset": how.offset}
    return Float4(sides(w_OI)), codes.view(torch.int8).view(-1), {"scale": how.absmax} | outer


def _without_values(blocks: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes and scales of so many blocks on the meta device, which bitsandbytes does not know."""
    with torch.device("meta"):
        floats = {"outer_scale": torch.empty(-(-blocks // OUTER)), "outer_code": torch.empty(256)}
        parts = {"scale": torch.empty(blocks, dtype=torch.uint8), **floats, "offset": torch.empty(())}
        return torch.empty(blocks * BLOCK // 2, dtype=torch.int8), parts


def sides(w_OI: Tensor) -> tuple[int, int]:
    """(out, in) of a matrix."""
    out, in_ = w_OI.shape
    return out, in_


WIDTHS: dict[str, Callable[[Tensor], Packed]] = {"int8": to_int8, "int4": to_int4}


@torch.no_grad()
def quantise(model: nn.Module, width: Width) -> None:
    """Keep the linear layers of attention and MLPs in few bits from now on; all else stays as it is.

    Head, embeddings, norms and stacked experts keep their floats. One layer is packed at a time, so weights that lie in
    a memory-mapped file are never in memory all at once.

    Args:
        model: any model whose layers lorakit knows, with no adapter attached.
        width: "int8" (a scale a row) or "int4" (NormalFloat4).

    Raises:
        BadState: an adapter is attached.
        BadModel: no such width, or no layer to quantise.
        MissingPackage: bitsandbytes is not installed.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=10))
        >>> quantise(model, "int8")
        >>> model.h[0].attn.c_attn
        QuantisedLinear(in_features=64, out_features=192, bias=True, 8 bits)
    """
    if width not in WIDTHS:
        raise BadModel(f"weights can be kept as {' or '.join(WIDTHS)}, not as {width!r}")
    for path in float_layers(model):
        put_in_place(model, path, WIDTHS[width](weight_at(model.get_submodule(path), None)))
    mark(model)


def float_layers(model: nn.Module) -> list[str]:
    """The paths of the layers that can be quantised.

    Raises:
        BadState: an adapter is attached.
        BadModel: there is none.
    """
    refuse_attached(model)
    sites = sites_of(model)
    paths = dict.fromkeys(s.path for s in matching(sites, "linear", model) if isinstance(s.layout, LinearLayout))
    floats = [path for path in paths if not isinstance(model.get_submodule(path), QuantisedLinear)]
    if not floats:
        raise BadModel(f"{type(model).__name__} has no linear layer in floats that could be quantised")
    if stacked := {f"{site.path}.{site.parameter}" for site in sites if site.experts}:
        log.warning("%d parameters hold stacked experts, which stay in floats, first %s", len(stacked), min(stacked))
    return floats


def refuse_attached(model: nn.Module) -> None:
    """Refuse to change the layers below an adapter.

    Raises:
        BadState: an adapter is attached.
    """
    if state_or_new(model).attached:
        raise BadState("an adapter is attached, and it belongs to the layers as they are; detach it first, or load the "
                       "model anew")  # fmt: skip


def put_in_place(model: nn.Module, path: str, packed: Packed) -> None:
    """Put a quantised layer in the place of a float one."""
    module, (packing, codes, parts) = model.get_submodule(path), packed
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    transposed = isinstance(layout_of(module), Conv1DLayout)
    layer = QuantisedLinear(packing, codes, parts, bias, dtype=weight.dtype, transposed=transposed)
    model.set_submodule(path, layer.train(module.training))


def mark(model: nn.Module) -> None:
    """Tell transformers that a linear layer's weight does not show in which dtype it computes."""
    if (config := getattr(model, "config", None)) is not None:
        config._is_quantized = True


@torch.no_grad()
def dequantise(model: nn.Module) -> None:
    """Turn every quantised layer back into one of floats: those that its codes stand for, not the original ones.

    What is left is an ordinary model: an adapter trained over the codes can be loaded, merged and written with
    `save_pretrained`.

    Raises:
        BadState: an adapter is attached.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=10))
        >>> quantise(model, "int8"); dequantise(model)
        >>> model.h[0].attn.c_attn
        Conv1D(nf=192, nx=64)
    """
    refuse_attached(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantisedLinear):
            model.set_submodule(path, _plain(module).train(module.training))
    if (config := getattr(model, "config", None)) is not None:
        vars(config).pop("_is_quantized", None)


def _plain(layer: QuantisedLinear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    out, in_ = layer.packing.shape
    with torch.device("meta"):
        plain = Conv1D(out, in_) if layer.transposed else nn.Linear(in_, out, bias=layer.bias is not None)
    plain.weight = nn.Parameter(layer.floats(layer.weight).contiguous(), requires_grad=False)
    plain.bias = layer.bias
    return plain
