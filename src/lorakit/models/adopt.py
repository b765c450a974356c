"""Take over what bitsandbytes quantised: a checkpoint that was saved so, or a model that transformers quantised.

The codes stay as they are; only the layers around them change to lorakit's, whose products are exact on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lorakit.core.quantised import QuantisedLinear
from lorakit.errors import BadModel
from lorakit.models.quantise import OUTER, Float4, Int8, Packed, Width, refuse_attached, sides

THEIRS = "bitsandbytes.nn.modules"


@torch.no_grad()
def adopt(model: nn.Module) -> set[Width]:
    """Put lorakit's layers in the place of those of bitsandbytes, with the same codes; gives their widths, if any.

    The model is an ordinary one from then on: transformers' Trainer takes it, once an adapter is attached.

    Raises:
        BadState: an adapter is attached.
        BadModel: layers that are not quantised yet, or were used on a CPU on which they rewrite their codes.

    Example:
        ```python
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-1.7B", quantization_config=config)
        adopt(model)
        lk.attach(model, lk.LoRA(rank=8), name="reviews")
        ```
    """
    found = [(path, module, kind) for path, module in model.named_modules() if (kind := _theirs(module)) in READERS]
    if not found:
        return set()
    refuse_attached(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for path, module, kind in found:
        if why := _unreadable(module):
            raise BadModel(f"{path} {why}")
        packing, codes, parts = READERS[kind][1](module)
        transposed = getattr(module, "source_cls", nn.Linear).__name__ == "Conv1D"
        layer = QuantisedLinear(packing, codes, parts, module.bias, dtype=dtype, transposed=transposed)
        model.set_submodule(path, layer.train(module.training))
    _unmark(model)
    return {READERS[kind][0] for _, _, kind in found}


def _theirs(module: nn.Module) -> str:
    """The name of the layer's class in bitsandbytes, if it is one of theirs."""
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__module__ == THEIRS), "")


def _unreadable(module: Any) -> str:
    """Why a layer cannot be taken over; "" where it can."""
    state = getattr(module.weight, "quant_state", None)
    if module.weight.is_floating_point():
        return "is not quantised yet; move the model to its device first: model.to('cpu')"
    if getattr(state, "packing_format_for_cpu", False):
        return "was used on a CPU on which bitsandbytes rewrites its codes; load the model anew"
    if state is not None and state.nested and state.state2.blocksize != OUTER:
        return f"has scales in blocks of {state.state2.blocksize}, which lorakit does not read"
    return ""


def _int4(module: Any) -> Packed:
    state = module.weight.quant_state
    packing = Float4(tuple(state.shape), state.quant_type, state.blocksize)
    parts: dict[str, Tensor] = {"scale": state.absmax}
    if state.nested:
        parts |= {"outer_scale": state.state2.absmax, "outer_code": state.state2.code, "offset": state.offset}
    codes = module.weight.data.view(torch.uint8).view(-1)
    return packing, pad(codes, (0, -len(codes) % (state.blocksize // 2))).view(torch.int8), parts


def _int8(module: Any) -> Packed:
    kept = module.state if module.state.CB is not None else module.weight
    codes = cast(Tensor, module.weight.data)
    return Int8(sides(codes)), codes.reshape(-1), {"scale": (kept.SCB.float() / 127).view(-1, 1)}


READERS: dict[str, tuple[Width, Callable[[Any], Packed]]] = {
    "Linear4bit": ("int4", _int4),
    "Linear8bitLt": ("int8", _int8),
}


def _unmark(model: Any) -> None:
    """Take off transformers' marks, because of which its Trainer would refuse what is attached."""
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(name, None)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
