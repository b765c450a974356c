"""Fold an adapter into a model's GGUF file, a few rows at a time: what does not change is copied byte for byte.

Legend: O out (rows), I in (columns), R rank, L and N the rows and columns of a tensor as it lies in the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lorakit.core.atomic import new_file
from lorakit.core.exchange import Exchange, Update
from lorakit.core.patterns import beyond, residual
from lorakit.core.values import Value
from lorakit.errors import BadAdapterFile, BadModel, NotMergeable
from lorakit.interop._gguf_file import DTYPES, Header, Stored, block_of, padded, read_header
from lorakit.interop._gguf_names import Layout, layout_in
from lorakit.interop.merged import Watch

F16 = 1  # GGUF's number of it
AT_ONCE = 1 << 22  # numbers that are merged at once


@torch.no_grad()
def merge_gguf(
    base: Path, adapter: Exchange, out: Path, watch: Watch | None = None, *, floats: bool = False
) -> list[str]:
    """Write a model's GGUF file with an adapter folded in.

    Each changed tensor is W + scale · B A in float32, from the base's own numbers, and is written in the base's own
    type: rounded once where that is a float, quantised again where the gguf package writes the type, and otherwise as
    F16. Quantising again can lose as much as the adapter changes, which is told. Metadata and other tensors keep their
    bytes. The file appears whole or not at all.

    Args:
        base: a model's GGUF file.
        adapter: what an adapter's file holds.
        out: a file that does not exist yet.
        watch: called with each tensor's name, its number and how many there are.
        floats: write quantised tensors that change as F16.

    Returns:
        What a user should know: how exact the written numbers are, by type.

    Raises:
        OutputExists: `out` is there already.
        BadModel: the base cannot be read, or how llama.cpp orders its rows is not known here.
        BadAdapterFile: the adapter does not fit the base, or is more than changes of weights.
        NotMergeable: a merged number is beyond what its type can hold.
    """
    header = read_header(base, lambda reason: BadModel(f"{base}: {reason}"))
    layout = layout_in(header)
    if faults := [*_faults(adapter), *layout.misfits(adapter.updates)]:
        raise BadAdapterFile("the adapter", faults)
    changes = {str(layout.tensor(update.path)): update for update in adapter.updates}
    jobs = {name: _Job(header.tensors[name], update, layout, floats) for name, update in changes.items()}
    with new_file(out) as path, path.open("wb") as file:
        _begin(file, header, jobs)
        for number, (name, stored) in enumerate(header.tensors.items(), 1):
            if watch:
                watch(name, number, len(header.tensors))
            file.writelines(jobs[name].chunks() if name in jobs else stored.chunks())
            file.write(bytes(-file.tell() % header.alignment))
    return list(_notes(jobs.values()))


def _faults(adapter: Exchange) -> Iterator[str]:
    instead = "merge it into the base's folder instead"
    yield from (*residual(adapter.config), *beyond(adapter.config))
    if not adapter.updates:
        yield "it has no low-rank updates"
    for update in adapter.updates:
        if update.shift is not None:
            yield f"{update.path} has a bias of B; {instead}"
        if update.magnitude is not None and update.form != "linear":
            yield f"{update.path} is DoRA's of an embedding; {instead}"
    if adapter.whole:
        some = ", ".join(list(adapter.whole)[:3])
        yield f"it holds {len(adapter.whole)} tensors in place of the base's own ({some}); {instead}"


class _Job:
    """One tensor that changes: its new bytes, and how exact they are."""

    def __init__(self, stored: Stored, update: Update, layout: Layout, floats: bool) -> None:
        self.stored, self.update, self.layout = stored, update, layout
        self.type = stored.type if stored.type in DTYPES or (_writes(stored.type) and not floats) else F16
        self.lost = self.length = self.change = 0.0  # squares of norms: of the rounding, the tensor and its change

    def chunks(self) -> Iterator[bytes]:
        """The new bytes, a few rows at a time."""
        left_LR, right_RN, magnitude_L = self._factors()
        step = max(1, AT_ONCE // self.stored.columns)
        for first in range(0, self.stored.rows, step):
            here = slice(first, min(first + step, self.stored.rows))
            old_LN = self.stored.read(here.start, here.stop).float()
            new_LN = torch.addmm(old_LN, left_LR[here], right_RN)
            if magnitude_L is not None:
                new_LN *= (magnitude_L[here] / new_LN.norm(dim=1))[:, None]
            raw, held_LN = _encoded(new_LN, self.type)
            self.lost += _square(held_LN - new_LN)
            self.length += _square(new_LN)
            self.change += _square(new_LN - old_LN)
            if not math.isfinite(self.lost):
                raise NotMergeable(f"merging gives {self.stored.name} a value that is not finite")
            yield raw

    def _factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Two matrices whose product is the tensor's change, and DoRA's lengths of its rows."""
        update, order = self.update, partial(self.layout.to_gguf, self.stored.name)
        a_RI, b_OR = self._real(update.a), self._real(order(update.b)) * update.scale
        if update.diagonal is not None:
            b_OR = b_OR * self._real(update.diagonal).flatten()
        magnitude_O = None if update.magnitude is None else self._real(order(update.magnitude))
        return (a_RI.T, b_OR.T, None) if update.form == "embedding" else (b_OR, a_RI, magnitude_O)

    def _real(self, value: Value) -> Tensor:
        found = value.read().float()
        if not bool(found.isfinite().all()):
            raise BadAdapterFile("the adapter", [f"{self.update.path} holds values that are not finite real numbers"])
        return found


def _square(rows_LN: Tensor) -> float:
    return float(rows_LN.norm(dim=1).double().square().sum())


def _writes(type: int) -> bool:
    """Whether the gguf package makes blocks of a type."""
    import gguf
    import numpy

    block, _ = block_of(type, "")
    try:
        gguf.quantize(numpy.zeros((1, block), dtype=numpy.float32), gguf.GGMLQuantizationType(type))
        return True
    except NotImplementedError:
        return False


def _encoded(new_LN: Tensor, type: int) -> tuple[bytes, Tensor]:
    """The bytes of rows in a type, and the numbers that these bytes stand for."""
    if type in DTYPES:
        held_LN = new_LN.to(DTYPES[type])
        return held_LN.view(torch.uint8).numpy().tobytes(), held_LN.float()
    import gguf
    import numpy

    number = gguf.GGMLQuantizationType(type)
    with numpy.errstate(all="ignore"):
        raw = gguf.quantize(new_LN.numpy(), number)
        return raw.tobytes(), torch.from_numpy(gguf.dequantize(raw, number))


def _begin(file: BinaryIO, header: Header, jobs: Mapping[str, _Job]) -> None:
    """Write all that comes before the tensors; only their types and places differ from the base's."""
    with header.path.open("rb") as base:
        file.write(base.read(header.infos))
    at = 0
    for name, stored in header.tensors.items():
        type = jobs[name].type if name in jobs else stored.type
        block, size = block_of(type, name)
        text, count = name.encode(), len(stored.shape)
        file.write(struct.pack(f"<Q{len(text)}sI{count}QIQ", len(text), text, count, *stored.shape[::-1], type, at))
        at = padded(at + math.prod(stored.shape) // block * size, header.alignment)
    file.write(bytes(-file.tell() % header.alignment))


def _notes(jobs: Iterable[_Job]) -> Iterator[str]:
    import gguf

    by_type: dict[tuple[int, int], list[_Job]] = {}
    for job in jobs:
        by_type.setdefault((job.stored.type, job.type), []).append(job)
    for (old, new), own in by_type.items():
        lost, length, change = (
            math.sqrt(sum(getattr(job, key) for job in own)) for key in ("lost", "length", "change")
        )
        was, now = (gguf.GGMLQuantizationType(type).name for type in (old, new))
        how = f"are rounded to {now} once" if old in DTYPES else f"are quantised to {now} again"
        how = how if old == new else f"were {was} and are {now}"
        if lost:
            yield (f"{len(own)} merged tensors {how}: relative error {lost / length:.1e}, which is "
                   f"{lost / change if change else math.inf:.1e} of what the adapter changes")  # fmt: skip
