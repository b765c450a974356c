"""Checkpoints: safetensors, written whole, two kept, no pickle.

A checkpoint holds the adapter's parameters and buffers and the optimiser's state. Learning rate, data order and random
state are functions of the seed and the step's number, so the number is all that has to be kept of them.

One process writes one file. Several write a folder together (`torch.distributed.checkpoint`), each a part of it; the
first then adds a list of the parts with their digests, and gives the folder its name, by which it is a checkpoint.
Whatever wrote it, any number of processes can go on from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from lorakit.core.atomic import write_files
from lorakit.errors import LorakitError
from lorakit.train.distributed import World, answered

_log = logging.getLogger(__name__)
_KEPT = 2
_STEP, _UNFINISHED = "step-", ".writing-"
_PARTS = "parts.json"  # of a folder: the digest of each file
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
    return Checkpoint(step, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


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


def file_name(step: int) -> str:
    """What the checkpoint of a step is called that one process writes.

    >>> file_name(12)
    'step-00000012.safetensors'
    """
    return f"{_STEP}{step:08d}.safetensors"


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint whole and keep it and the one before it."""
    path = folder / file_name(checkpoint.step)
    state = {"step": checkpoint.step, "digest": _digest(checkpoint.step, checkpoint.tensors)}
    write_files(folder, {path.name: to_bytes(dict(checkpoint.tensors), {"lorakit": json.dumps(state)})})
    _keep_two(folder, path)
    return path


def write_together(folder: Path, checkpoint: Checkpoint, world: World) -> Path:
    """`write` by all processes, each of which writes a part; all of them have to see the folder.

    Raises:
        LorakitError: a part could not be written, or the first process does not see it.
        Interrupted: another process is gone.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    path = folder / f"{_STEP}{checkpoint.step:08d}"
    parts = folder / f"{_UNFINISHED}{path.name}"
    if world.is_first:
        shutil.rmtree(parts, ignore_errors=True)
    world.told(None)
    try:
        with answered():
            save(dict(checkpoint.tensors), storage_writer=HuggingFaceStorageWriter(str(parts), save_distributed=True))
    except CheckpointException as error:
        shutil.rmtree(parts, ignore_errors=True)
        told = "; ".join(f"process {rank}: {_reason(wrong)}" for rank, (wrong, _) in sorted(error.failures.items()))
        raise LorakitError(f"{path} could not be written ({told}); the checkpoint before it is as it was") from error
    if world.is_first:
        _commit(parts, path, checkpoint)
    world.told(None)
    return path


def _commit(parts: Path, path: Path, checkpoint: Checkpoint) -> None:
    """Let a folder that is written whole become a checkpoint."""
    if _metadata(parts).keys() != checkpoint.tensors.keys():
        raise LorakitError(f"{parts} does not have what all processes wrote: the output folder has to be on a file "
                           "system that all of them share")  # fmt: skip
    digests = {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in parts.glob("*.safetensors")}
    write_files(parts, {_PARTS: json.dumps(digests).encode()})
    shutil.rmtree(path, ignore_errors=True)  # a damaged one, which was passed over
    os.replace(parts, path)
    write_files(path.parent, {})  # the new name, too, is on the disk
    _keep_two(path.parent, path)


def _reason(error: BaseException) -> object:
    return (error.strerror if isinstance(error, OSError) else None) or error


def _keep_two(folder: Path, path: Path) -> None:
    """Keep a new checkpoint and the one before it, not older ones, damaged ones that were passed over, and parts."""
    kept = [found for found in _newest_first(folder) if found <= path][:_KEPT]
    for other in {*_newest_first(folder), *folder.glob(f"{_UNFINISHED}*")}.difference(kept):
        shutil.rmtree(other) if other.is_dir() else other.unlink()


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
    if path.is_dir():
        return _read_parts(path)
    with safe_open(path, framework="pt") as file:
        state = json.loads((file.metadata() or {})["lorakit"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if _digest(state["step"], tensors) != state["digest"]:
        raise ValueError("its contents do not match its digest")
    return Checkpoint(state["step"], tensors)


def _read_parts(path: Path) -> Checkpoint:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    for name, digest in json.loads((path / _PARTS).read_bytes()).items():
        if hashlib.sha256((path / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"the contents of {name} do not match its digest")
    tensors = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in _metadata(path).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it reads alone, which is meant
        load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    return Checkpoint(int(path.name.removeprefix(_STEP)), tensors)


def _metadata(path: Path) -> dict[str, Any]:
    """Sizes and types of the tensors in a folder, by name."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_STEP}*"), reverse=True)


def _digest(step: int, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(str(step).encode())
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)};".encode())
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
