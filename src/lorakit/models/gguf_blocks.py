"""Keep the linear layers of a GGUF base in the blocks of its file, so that they compute what the converted base does.

A layer's tensor is found by its values, as names and the order of rows differ between GGUF and transformers; what is
found is compared to the bit. Layers without one (an unknown type of block, columns in another order) keep floats.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.quantised import Packing
from lorakit.core.sites import weight_at
from lorakit.errors import BadModel, MissingPackage
from lorakit.models.quantise import float_layers, mark, put_in_place

Key = tuple[int, int, int]  # a matrix's shape, and what its rows' hashes add up to

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blocks(Packing):
    """GGUF's blocks, each with its numbers' codes and scales side by side."""

    type: int  # GGUF's number of the type
    numbers: int  # of a block
    bytes: int  # of a block

    @property
    def bits(self) -> float:
        return 8 * self.bytes / self.numbers

    def unpack(self, codes: Tensor, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return _readers()[0].dequantize(codes.view(torch.uint8), self.type, torch.float32).view(self.shape).to(dtype)


@torch.no_grad()
def keep_blocks(model: nn.Module, path: Path) -> None:
    """Keep in their blocks the linear layers of a model that was converted from a GGUF file, and is still in float32.

    Raises:
        BadState: an adapter is attached.
        BadModel: no layer of the model is in the file as blocks.
        MissingPackage: transformers is too old to read blocks.
    """
    layers, left = float_layers(model), []
    found = {tensor.key: tensor for tensor in _tensors(path)}
    for name in layers:
        w_OI = weight_at(model.get_submodule(name), None)
        packed = _packed(w_OI, found)
        if packed is None:
            left.append(name)
        else:
            put_in_place(model, name, (*packed, {}))
    if len(left) == len(layers):
        raise BadModel(f"{path} keeps no layer of {type(model).__name__} in blocks that lorakit can find and read; "
                       "take quantise='int8' or 'int4'")  # fmt: skip
    if left:
        log.warning("%d of %d layers stay in floats, as %s has no blocks of theirs that can be read: %s",
                    len(left), len(layers), path.name, ", ".join(left[:3]))  # fmt: skip
    mark(model)


def _packed(w_OI: Tensor, found: Mapping[Key, _Found]) -> tuple[Blocks, Tensor] | None:
    """The blocks that are this matrix, to the bit."""
    hashes_O = _hashes(w_OI)
    tensor = found.get(_key(w_OI.shape, hashes_O))
    if tensor is None:
        return None
    packing, codes = tensor.ordered(hashes_O)
    return (packing, codes) if torch.equal(packing.unpack(codes, (), torch.float32), w_OI.float()) else None


@dataclass(frozen=True, eq=False)
class _Found:
    """A tensor of the file: its blocks (rows, bytes), and a hash of each row's numbers."""

    packing: Blocks
    raw: Any  # read from the file by indexing
    hashes_O: Tensor

    @property
    def key(self) -> Key:
        return _key(self.packing.shape, self.hashes_O)

    def ordered(self, hashes_O: Tensor) -> tuple[Blocks, Tensor]:
        """How it is packed, and its blocks with rows in the order of these hashes."""
        rows_O = self.hashes_O.argsort(stable=True)[hashes_O.argsort(stable=True).argsort()]
        return self.packing, self.raw[...][rows_O].view(torch.int8).view(-1)


def _tensors(path: Path) -> Iterator[_Found]:
    dequant, reader = _readers()
    for tensor in reader.load_gguf_state_dict(reader.GgufHeader.from_file(str(path))).values():
        if tensor.ggml_type in dequant.GGML_BLOCK and len(tensor.shape) == 2:
            numbers, size = dequant.GGML_BLOCK[tensor.ggml_type]
            rows, width = tensor.shape
            packing = Blocks((rows, width // size * numbers), tensor.ggml_type, numbers, size)
            yield _Found(packing, tensor, _hashes(packing.unpack(tensor[...], (), torch.float32)))


def _hashes(w_OI: Tensor) -> Tensor:
    """A number for each row that depends on all its bits: their product with fixed odd numbers, modulo 2⁶⁴."""
    generator = torch.Generator().manual_seed(0)
    factors_I = torch.randint(-(2**62), 2**62, (w_OI.shape[1],), generator=generator) * 2 + 1
    return (w_OI.float().contiguous().view(torch.int32).long() * factors_I).sum(1)


def _key(shape: Sequence[int], hashes_O: Tensor) -> Key:
    return shape[0], shape[1], int(hashes_O.sum())


def _readers() -> tuple[Any, Any]:
    try:
        from transformers.integrations.gguf import dequant, reader
    except ImportError as error:
        raise MissingPackage("keeping GGUF blocks needs a transformers that reads them with PyTorch; install a newer "
                             "one: pip install -U transformers") from error  # fmt: skip
    return dequant, reader
