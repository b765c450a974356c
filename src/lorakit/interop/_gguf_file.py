"""A GGUF file's header and tensors, read from their places in the file, so that memory never holds a vocabulary.

`gguf.GGUFReader` makes two arrays of every token: 3 s and 160 MB for the 49,152 of SmolLM2, whose weights take 98 MB.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import BadModel

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1 counts in 32 bits
DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # by GGUF's number of the type
TYPES = {dtype: number for number, dtype in DTYPES.items()}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LONG = 4096  # arrays of more entries are a vocabulary's
CHUNK = 1 << 22  # bytes copied at once


@dataclass(frozen=True)
class Stored:
    """A tensor of a GGUF file: what it is, and where it lies."""

    path: Path
    name: str
    shape: tuple[int, ...]  # rows last but one, columns last
    type: int  # GGUF's number of the type
    start: int  # byte in the file
    size: int

    @property
    def columns(self) -> int:
        """How many numbers a row has."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return math.prod(self.shape[:-1])

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """The rows from `first` to before `last` as numbers (rows, columns): floats as they are, blocks in float32."""
        raw = self._bytes(first, self.rows if last is None else last)
        if self.type in DTYPES:
            return torch.frombuffer(raw, dtype=DTYPES[self.type]).view(-1, self.columns)
        import gguf
        import numpy

        blocks, type = numpy.frombuffer(raw, dtype=numpy.uint8), gguf.GGMLQuantizationType(self.type)
        try:
            return torch.from_numpy(gguf.dequantize(blocks.reshape(-1, self.size // self.rows), type))
        except NotImplementedError:
            raise BadModel(f"{self.path}: {self.name} is {type.name}, which the gguf package cannot read") from None

    def _bytes(self, first: int, last: int) -> bytearray:
        width = self.size // self.rows
        with self.path.open("rb") as file:
            file.seek(self.start + first * width)
            return bytearray(file.read((last - first) * width))

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, a few at a time."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            for start in range(0, self.size, CHUNK):
                yield file.read(min(CHUNK, self.size - start))


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its numbers; of long arrays and of strings in arrays only that they are there."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, Stored]
    infos: int  # the byte where the list of tensors begins
    alignment: int

    def entry(self, key: str) -> Any:
        """The value of a key that begins with the name of the architecture, or None."""
        return self.values.get(f"{self.values.get('general.architecture')}.{key}")


def read_header(path: Path, error: Callable[[str], Exception]) -> Header:
    """The header of a GGUF file.

    Raises:
        error: the file is not GGUF, damaged, or of a kind that is not known here; `error` makes it from the sentence.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _header(path, _Cursor(data))
    except _Unreadable as fault:
        raise error(str(fault)) from None
    except OSError as fault:
        raise error(f"it cannot be read ({fault.strerror})") from fault
    except (ValueError, struct.error, KeyError, RecursionError, OverflowError) as fault:
        raise error(f"it is damaged, or no GGUF file ({fault})") from fault


class _Unreadable(Exception):
    """A sentence for the user."""


class _Cursor:
    """A place in the bytes of a file, which moves as they are read."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def skip(self, size: int) -> int:
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError("it ends early")
        return start

    def text(self) -> str:
        size = self.number("Q")
        start = self.skip(size)
        return self.data[start : start + size].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        return self.array() if kind == ARRAY else self.number(SCALARS[kind])

    def array(self) -> list[Any] | None:
        kind, count = self.number("I"), self.number("Q")
        if kind not in SCALARS:
            for _ in range(count):
                self.value(kind)
            return None
        start = self.skip(count * struct.calcsize(SCALARS[kind]))
        return None if count > LONG else list(struct.unpack_from(f"<{count}{SCALARS[kind]}", self.data, start))


def _header(path: Path, cursor: _Cursor) -> Header:
    if cursor.data[: len(MAGIC)] != MAGIC:
        raise _Unreadable(f"it does not begin with {MAGIC.decode()}, so it is no GGUF file")
    version = cursor.number("4xI")
    if version not in VERSIONS:
        known = f"lorakit reads {' and '.join(map(str, VERSIONS))}"
        raise _Unreadable("it is written for big-endian machines" if version & 0xFFFF == 0 else
                          f"it is of version {version} of GGUF; {known}")  # fmt: skip
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    values = {cursor.text(): cursor.value(cursor.number("I")) for _ in range(keys)}
    infos = cursor.at
    listed = [_tensor(path, cursor) for _ in range(tensors)]
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Unreadable(f"its alignment is {alignment}, which is no power of two")
    begin = padded(cursor.at, alignment)
    found = {each.name: replace(each, start=begin + each.start) for each in listed}
    if len(found) < len(listed):
        raise _Unreadable("it names a tensor twice")
    cut = next((name for name, each in found.items() if each.start + each.size > len(cursor.data)), None)
    if cut is not None:
        raise _Unreadable(f"it ends early: {cut} is not whole")
    return Header(path, values, found, infos, alignment)


def _tensor(path: Path, cursor: _Cursor) -> Stored:
    """The next of the list of tensors; it starts at a byte after the list's end."""
    name, dimensions = cursor.text(), cursor.number("I")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    type, start = cursor.number("I"), cursor.number("Q")
    block, size = block_of(type, name)
    if not shape or not all(shape) or shape[-1] % block:
        raise _Unreadable(f"{name} has the shape {shape}, which blocks of {block} numbers cannot have")
    return Stored(path, name, shape, type, start, math.prod(shape) // block * size)


def block_of(type: int, name: str) -> tuple[int, int]:
    """How many numbers a block of a type holds, and how many bytes it takes."""
    if type in DTYPES:
        return 1, DTYPES[type].itemsize
    import gguf

    try:
        return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type)]
    except (ValueError, KeyError):
        raise _Unreadable(f"{name} is of the type {type}, which this gguf package does not know; "
                          "install a newer one: pip install -U gguf") from None  # fmt: skip


def padded(size: int, alignment: int) -> int:
    """The next multiple of the alignment.

    >>> padded(33, 32), padded(64, 32)
    (64, 64)
    """
    return -(-size // alignment) * alignment
