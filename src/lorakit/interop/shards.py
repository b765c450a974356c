"""safetensors files read and written one tensor at a time, so that memory holds one tensor, not a file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakit.core.checked import misfits
from lorakit.core.values import Value
from lorakit.errors import BadAdapterFile, BadModel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHUNK = 1 << 22  # bytes copied at once
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard: where it lies and what it is."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte in the shard
    size: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        if self.dtype not in DTYPES:
            raise BadModel(f"{self.shard} holds a tensor of type {self.dtype}, which cannot be merged")
        with _reading(self.shard), self.shard.open("rb") as file:
            file.seek(self.start)
            data = bytearray(file.read(self.size))
        flat = torch.frombuffer(data, dtype=DTYPES[self.dtype]) if data else torch.empty(0, dtype=DTYPES[self.dtype])
        return flat.reshape(self.shape)

    @property
    def value(self) -> Value:
        """The tensor, to be read later."""
        return Value(self.shape, DTYPES.get(self.dtype, torch.uint8), self.read)

    def chunks(self) -> Iterator[bytes]:
        """The tensor's bytes, a few at a time."""
        with _reading(self.shard), self.shard.open("rb") as file:
            file.seek(self.start)
            for start in range(0, self.size, CHUNK):
                yield file.read(min(CHUNK, self.size - start))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise BadModel(f"{path} is damaged ({error})") from error


def shards_of(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of their names.

    Raises:
        BadModel: there are none, one that the index names is missing, or the index is damaged.
    """
    if (folder / INDEX).is_file():
        named = _named_by(folder / INDEX)
        absent = [name for name in named if not (folder / name).is_file()]
        if absent:
            raise BadModel(f"{folder} lacks the shard {absent[0]} that its index names")
        return [folder / name for name in named]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise BadModel(f"{folder} holds no safetensors weights; save the model again with save_pretrained")


def _named_by(index: Path) -> list[str]:
    with _reading(index):
        told = json.loads(index.read_text("utf-8"))
    wanted = {"weight_map": Mapping[str, str]}
    faults = misfits(told, wanted, str(index), required=wanted)
    named = [] if faults else sorted(set(told["weight_map"].values()))
    faults += [f"{index} names {name!r}, which is not a file beside it" for name in named if Path(name).name != name]
    if faults:
        raise BadModel(faults[0])
    return named


def entries(shard: Path) -> dict[str, Entry]:
    """Every tensor of a shard by name, in the order in which they lie there.

    Raises:
        BadModel: the file is damaged.
    """
    return opened(shard)[0]


def opened(shard: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """`entries`, and the metadata beside them."""
    with _reading(shard):
        with safe_open(shard, framework="pt"):  # checks the header, and that the tensors fill the file
            pass
        with shard.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    found = {name: _entry(shard, 8 + length, told) for name, told in header.items()}
    return dict(sorted(found.items(), key=lambda item: item[1].start)), metadata


def _entry(shard: Path, offset: int, told: Mapping[str, Any]) -> Entry:
    start, end = told["data_offsets"]
    return Entry(shard, told["dtype"], tuple(told["shape"]), offset + start, end - start)


def write_header(
    file: BinaryIO, tensors: Sequence[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] | None = None
) -> None:
    """Begin a safetensors file whose tensors (name, dtype, shape, bytes) follow in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
    at = 0
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    """Append a tensor's bytes."""
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_values(path: Path, values: Mapping[str, Value], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, holding one tensor at a time; the same values give the same bytes.

    Raises:
        BadAdapterFile: a value that is no finite real number.
    """
    if strange := [
        f"{key} is of {each.dtype}, no real numbers" for key, each in values.items() if each.dtype not in NAMES
    ]:
        raise BadAdapterFile("the adapter", strange)
    order = sorted(values.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))  # each begins at a multiple
    with path.open("wb") as file:
        write_header(file, [(key, NAMES[each.dtype], each.shape, each.bytes) for key, each in order], metadata)
        for key, each in order:
            tensor = each.read()
            if tensor.is_complex() or not tensor.float().isfinite().all():
                raise BadAdapterFile("the adapter", [f"{key} holds values that are not finite real numbers"])
            write_tensor(file, tensor)
