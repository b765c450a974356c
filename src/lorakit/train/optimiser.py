"""What an optimiser gets of one adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorakit.core.attach import parameters
from lorakit.core.state import adapter_tensors, attached_to, deltas_of
from lorakit.errors import BadMethod, BadState
from lorakit.train.settings import Train


def optimizer_for(
    model: nn.Module, name: str, trained: Mapping[str, nn.Parameter], settings: Train
) -> torch.optim.AdamW:
    """AdamW over the adapter's parameters; on a CPU all in one call, which many small tensors need."""
    fused = all(parameter.device.type == "cpu" for parameter in trained.values())
    groups = _groups(model, name, trained, settings)
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=fused or None)


def trained_in(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's trainable parameters by path."""
    wanted = {id(parameter) for parameter in parameters(model, name)}
    if not wanted:
        raise BadState(f"the adapter {name!r} has no trainable parameter; attach one, or load(..., trainable=True)")
    return {key: parameter for key, parameter in adapter_tensors(model, name).items() if id(parameter) in wanted}


def _groups(model: nn.Module, name: str, trained: Mapping[str, nn.Parameter], settings: Train) -> list[dict[str, Any]]:
    """The optimiser's groups: LoRA+ (Hayou et al. 2024, arXiv:2402.12354) lets the output's side learn faster.

    Raises:
        BadMethod: a ratio for a method whose factors have no sides.
    """
    if settings.outer_ratio == 1:
        return [{"params": list(trained.values()), "ratio": 1.0}]
    sides = [(delta.outer, key, p) for delta in deltas_of(model, name) for key, p in delta.named_parameters()]
    outer = {id(parameter) for names, key, parameter in sides if key in names}
    if not outer:
        raise BadMethod(f"outer_ratio={settings.outer_ratio:g} needs factors on an output's side (LoRA's B), and "
                        f"{attached_to(model, name).method.name} has none; leave it at 1")  # fmt: skip
    fast = [parameter for parameter in trained.values() if id(parameter) in outer]
    slow = [parameter for parameter in trained.values() if id(parameter) not in outer]
    return [{"params": slow, "ratio": 1.0}, {"params": fast, "ratio": settings.outer_ratio}]
