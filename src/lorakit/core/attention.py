"""One small attention interface: a transformers model that reads a line of segments without padding.

While `flat` is open, the model's attention layers call `attend`, which transformers finds by its name in its registry;
it builds no mask for an implementation that it does not know. The segments come along as an argument of the forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from lorakit.errors import BadModel
from lorakit.kernels.segments import Segments, segment_attention

_NAME: Final = "lorakit-segments"
_SEGMENTS: Final = "lorakit_segments"
_WINDOWS: Final = ("sliding_window", "attention_chunk_size")
_HARMLESS: Final = frozenset({"scaling", "dropout", "is_causal", "position_ids", *_WINDOWS})


@contextmanager
def flat(model: Any) -> Iterator[None]:
    """Let the model's attention keep segments apart, forward and backward, inside the block."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_NAME, _attend)
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = _NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def flat_inputs(ids_T: Tensor, positions_T: Tensor, segments: Segments, device: Any) -> dict[str, Any]:
    """What a model is called with for one line of tokens."""
    told = {_SEGMENTS: segments.to(device), "use_cache": False}
    return {"input_ids": ids_T[None].to(device), "position_ids": positions_T[None].to(device), **told}


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **told: Any
) -> tuple[Tensor, None]:
    """The attention of one layer: (1, heads, T, width) each, and the output (1, T, heads, width).

    Raises:
        BadModel: the layer asks for more than attention to what came before (a bias, a cap, sinks).
    """
    segments: Segments | None = told.pop(_SEGMENTS, None)
    if segments is None or not getattr(module, "is_causal", True):
        raise BadModel(f"{type(module).__name__} does not say which tokens belong together")
    asked = [name for name, value in told.items() if name not in _HARMLESS and isinstance(value, Tensor | float)]
    if asked:
        raise BadModel(f"{type(module).__name__} attends with {', '.join(asked)}, which segments do not know")
    q_THD, k_THD, v_THD = (states[0].transpose(0, 1) for states in (query, key, value))
    scale, dropout = told.get("scaling"), told.get("dropout") or 0.0
    return segment_attention(q_THD, k_THD, v_THD, segments, scale, dropout)[None], None


# Segments differ from batch to batch, and a compiler would make code for each.
_attend = torch.compiler.disable(attend)


def reads_flat(model: Any, longest: int) -> str:
    """Why a model cannot read lines of segments of up to `longest` tokens, as far as its configuration tells; or ""."""
    body = model.base_model
    parameters = inspect.signature(type(body).forward).parameters
    if "position_ids" not in parameters:
        return "takes no position ids"
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return "passes nothing on to its attention"
    config = model.config.get_text_config()
    windows = [size for name in _WINDOWS if isinstance(size := getattr(config, name, None), int)]
    if windows and longest > min(windows):
        return f"attends to {min(windows)} tokens only, and an example has {longest}"
    return ""


def _configs(model: Any) -> list[Any]:
    """Each configuration that a module of the model reads, once."""
    found = (module.__dict__.get("config") for module in model.modules())
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation")}.values())
