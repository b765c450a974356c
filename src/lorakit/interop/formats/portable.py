"""A PEFT folder that every reader reads the same way: one rank, the scale folded into B, no patterns, only A and B.

PEFT, vLLM, SGLang and llama.cpp's converter differ in which fields of the config they read. Here alpha is the rank, so
that the scale is 1 for all of them, also for those that ignore it; lower ranks are padded with zeros.

Legend: R rank, I in, O out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.core.exchange import Exchange, Update
from lorakit.core.patterns import beyond
from lorakit.core.values import Value
from lorakit.errors import BadAdapterFile
from lorakit.interop.format import Told
from lorakit.interop.formats import peft

TITLE = "portable PEFT folder"
KEPT = ("target_modules", "lora_dropout", "fan_in_fan_out")  # of a config
NARROWED = ("layers_to_transform", "exclude_modules")  # by which target_modules means fewer layers
_EXACT = (torch.float32, torch.float64)
_RANGE = (*_EXACT, torch.bfloat16)  # dtypes of so many exponents that a power of two rounds nothing


def recognises(path: Path) -> bool:
    """Never: a portable folder is a PEFT folder."""
    return False


def read(path: Path, told: Told) -> NoReturn:
    """It is read as a PEFT folder."""
    raise BadAdapterFile(path, ["a portable folder is a PEFT folder"])


def write(exchange: Exchange, out: Path, told: Told) -> list[str]:
    """A PEFT folder of the same updates; says how exact the folded numbers are.

    Raises:
        BadAdapterFile: something that not every reader has words for.
    """
    if faults := list(_faults(exchange, told)):
        raise BadAdapterFile("the adapter", faults)
    rank = told.rank or max(update.rank for update in exchange.updates)
    errors = [error(update) for update in exchange.updates]
    told_of = exchange.config
    kept = [key for key in KEPT if key in told_of and not (key == KEPT[0] and any(map(told_of.get, NARROWED)))]
    plain = Exchange(
        format=exchange.format,
        updates=tuple(_padded(_folded(update), rank) for update in exchange.updates),
        base=exchange.base,
        task=exchange.task,
        config={key: told_of[key] for key in kept},
    )
    peft.write(plain, out, told)
    padded = sum(update.rank < rank for update in exchange.updates)
    notes = [f"{padded} of {len(errors)} updates are padded with zeros to rank {rank}"] if padded else []
    return [*notes, f"scales are folded into B: relative error at most {max(errors):.1e}"]


def _faults(exchange: Exchange, told: Told) -> Iterator[str]:
    merge = "merge it into its base instead"
    yield from beyond(exchange.config)
    if told.rank is not None and not 1 <= told.rank <= max((max(each.sides) for each in exchange.updates), default=1):
        yield f"no matrix of it is so large that the rank {told.rank} asked for makes sense"
    if not exchange.updates:
        yield "it has no low-rank updates"
    for update in exchange.updates:
        if update.magnitude is not None:
            yield f"{update.path} is DoRA's, of which a scaled product is no equal; {merge}"
        if update.shift is not None:
            yield f"{update.path} has a bias of B, which not every reader knows; {merge}"
        if update.form in ("experts", "convolution"):
            yield f"{update.path} adapts {update.form}, which not every reader knows; {merge}"
        if told.rank and update.rank > told.rank:
            yield f"{update.path} has rank {update.rank}, above the {told.rank} asked for; compress it first"
    if exchange.whole:
        count, some = len(exchange.whole), ", ".join(list(exchange.whole)[:3])
        yield f"it holds {count} tensors in place of the base's own ({some}), which not every reader knows; {merge}"


def _folded(update: Update) -> Update:
    """Scale 1: scale · B Λ in place of B, in float32 where the file's dtype could not hold it exactly."""
    kept = _is_exact(update)
    dtype = update.b.dtype if kept or update.b.dtype in _EXACT else torch.float32
    b = update.b.then(lambda b_OR: _scaled(update, b_OR).to(dtype), dtype=dtype)
    return replace(update, b=b, diagonal=None, alpha=float(update.rank), rooted=False)


def _is_exact(update: Update) -> bool:
    """Whether only exponents change."""
    is_whole = update.scale == 1 or update.b.dtype in _RANGE
    return is_whole and update.diagonal is None and abs(math.frexp(update.scale)[0]) in (0.0, 0.5)


def _scaled(update: Update, b_OR: Tensor) -> Tensor:
    scaled_OR = b_OR.double() * update.scale
    return scaled_OR if update.diagonal is None else scaled_OR * update.diagonal.read().double().flatten()


def error(update: Update) -> float:
    """‖B' - scale · B Λ‖ / ‖scale · B Λ‖: how exact the folded B' is.

    >>> from lorakit.core.values import value_of
    >>> error(Update("q", value_of(torch.ones(2, 3)), value_of(torch.ones(3, 2)), alpha=4.0))
    0.0
    """
    exact_OR = _scaled(update, update.b.read())
    length = float(exact_OR.norm())
    return float((_folded(update).b.read().double() - exact_OR).norm()) / length if length else 0.0


def _padded(update: Update, rank: int) -> Update:
    more = rank - update.rank
    if not more:
        return update
    a = _longer(update.a, 0, more)
    return replace(update, a=a, b=_longer(update.b, 1, more), alpha=float(rank), slices=())


def _longer(value: Value, dim: int, more: int) -> Value:
    shape = [size + more * (number == dim) for number, size in enumerate(value.shape)]
    pads = [0] * (2 * (len(shape) - 1 - dim)) + [0, more]
    return value.then(lambda tensor: F.pad(tensor, pads), shape)
