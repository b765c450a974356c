"""Checkpoints: one safetensors file a checkpoint, written whole, two kept, no pickle.

A checkpoint holds the adapter's parameters and buffers and the optimiser's state. Learning rate, data order and random
state are functions of the seed and the step's number, so the number is all that has to be kept of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lorakit.core.atomic import write_files

_log = logging.getLogger(__name__)
_KEPT = 2
_PARAMETER, _BUFFER = "parameter", "buffer"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after `step` steps: `<kind>:<name>` -> tensor; a kind is parameter, buffer or the optimiser's."""

    step: int
    tensors: Mapping[str, Tensor]


def take(
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    buffers: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """The present state of these parameters, of their optimiser, and of what else the adapter keeps."""
    tensors = {f"{_BUFFER}:{name}": value for name, value in (buffers or {}).items()}
    for name, parameter in parameters.items():
        state = {_PARAMETER: parameter.detach(), **optimizer.state.get(parameter, {})}
        tensors.update((f"{kind}:{name}", tensor) for kind, tensor in state.items())
    return Checkpoint(step, tensors)


@torch.no_grad()
def restore(
    checkpoint: Checkpoint,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    buffers: Mapping[str, Tensor] | None = None,
) -> None:
    """Put a checkpoint back into the parameters, the optimiser and the buffers."""
    optimizer.state.clear()
    for key, tensor in checkpoint.tensors.items():
        kind, name = key.split(":", 1)
        if kind == _BUFFER:
            (buffers or {})[name].copy_(tensor)
            continue
        parameter = parameters[name]
        if kind == _PARAMETER:
            parameter.copy_(tensor)
        else:  # the optimiser counts steps on the CPU
            optimizer.state[parameter][kind] = tensor.clone() if tensor.dim() == 0 else tensor.to(parameter.device)


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint whole and keep it and the one before it."""
    path = folder / f"step-{checkpoint.step:08d}.safetensors"
    tensors = {name: tensor.cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    state = {"step": checkpoint.step, "digest": _digest(checkpoint.step, tensors)}
    write_files(folder, {path.name: save(tensors, {"lorakit": json.dumps(state)})})
    kept = [found for found in _newest_first(folder) if found <= path][:_KEPT]
    for other in set(_newest_first(folder)).difference(kept):  # older ones, and damaged ones that were passed over
        other.unlink()
    return path


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint; damaged ones are passed over with a notice, and None means that there is none."""
    for path in _newest_first(folder):
        try:
            return read(path)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            _log.warning("the checkpoint %s is damaged (%s): the one before it is used", path, error)
    return None


def read(path: Path) -> Checkpoint:
    """Read one checkpoint and compare it with its digest."""
    with safe_open(path, framework="pt") as file:
        state = json.loads((file.metadata() or {})["lorakit"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if _digest(state["step"], tensors) != state["digest"]:
        raise ValueError("its contents do not match its digest")
    return Checkpoint(state["step"], tensors)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def _digest(step: int, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(str(step).encode())
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)};".encode())
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
