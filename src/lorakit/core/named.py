"""Tensors of deltas by their names in a file: `<path>.<slot>.<parameter>`, for methods that PEFT has no words for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.core.delta import Delta


def named_tensors(deltas: Sequence[Delta]) -> dict[str, Tensor]:
    """Parameters and saved buffers of deltas; what several of them share stands once, under the first."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for delta in deltas:
        for key, value in delta.state_dict(keep_vars=True).items():
            if id(value) not in seen:
                seen.add(id(value))
                found[f"{delta.placement.path}.{delta.placement.slot}.{key}"] = value
    return found


def read_named(deltas: Sequence[Delta], tensors: dict[str, Tensor]) -> list[str]:
    """Copy tensors into deltas by these names; used ones leave `tensors`; every fault comes back."""
    return fill(named_tensors(deltas), tensors)


@torch.no_grad()
def fill(own: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """Copy `tensors` into our live ones of the same names; used ones leave `tensors`; every fault comes back."""
    faults = []
    for key, mine in own.items():
        value = tensors.pop(key, None)
        if value is None:
            faults.append(f"{key} is missing")
        elif value.shape != mine.shape:
            faults.append(f"{key} has shape {tuple(value.shape)}, the model needs {tuple(mine.shape)}")
        else:
            mine.copy_(value)
    return faults
