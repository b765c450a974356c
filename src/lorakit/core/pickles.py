"""Files of `torch.save`, read as plain tensors: nothing that stands in them is ever run."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.core.values import Value
from lorakit.errors import BadAdapterFile

SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
_REFUSED = re.compile(r"GLOBAL (\S+)")


def read_pickle(path: Path, within: Sequence[str] = ()) -> dict[str, Value]:
    """The tensors of a file of `torch.save` by name, in the file's order; a file of today's layout is read lazily.

    Args:
        path: the file.
        within: entries that may hold the tensors in place of the file's top (`{"state_dict": {...}, "epoch": 3}`).

    Raises:
        BadAdapterFile: it is damaged, no file of `torch.save`, or holds something besides tensors, which is named.
    """
    loaded = _loaded(path)
    inner = next((loaded[key] for key in within if key in loaded), loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(inner, Mapping):
        raise BadAdapterFile(path, [f"it holds a {type(inner).__name__}, not tensors by name"])
    faults = [fault for name, each in inner.items() if (fault := _fault(name, each))]
    if faults:
        raise BadAdapterFile(path, faults)
    return {name: _value(each) for name, each in inner.items()}


def _loaded(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise BadAdapterFile(path, ["there is no such file"]) from error
    except Exception as error:  # what a pickle can do wrong is without end
        refused = _REFUSED.search(str(error))
        name = refused[1] if refused else next(_globals(path), None)
        reason = f"it is a pickle that wants to call {name}, which is no tensor and could run code" if name else ""
        raise BadAdapterFile(path, [reason or "it is damaged, or was not written by torch.save"]) from error


def _globals(path: Path) -> Iterator[str]:
    """What a pickle that torch.save did not write would call, by names; found without calling it."""
    words: list[str] = []
    try:
        for code, argument, _ in pickletools.genops(path.read_bytes()):
            if code.name == "STACK_GLOBAL":
                yield ".".join(words[-2:])
            elif code.name in ("GLOBAL", "INST"):
                yield str(argument).replace(" ", ".")
            elif isinstance(argument, str):
                words.append(argument)
    except (ValueError, OSError):
        return


def _fault(name: object, each: object) -> str | None:
    if not isinstance(name, str):
        return f"it names a tensor {name!r}, which is no text"
    if not isinstance(each, Tensor):
        return f"{name} is a {type(each).__name__}, not a tensor"
    if each.is_meta or each.layout != torch.strided or each.is_quantized:
        return f"{name} is a tensor without plain values (on the meta device, sparse or quantised)"
    return None


def _value(tensor: Tensor) -> Value:
    plain = tensor.detach()
    return Value(tuple(plain.shape), plain.dtype, lambda: plain.clone(memory_format=torch.contiguous_format))
