"""A PEFT folder that every reader reads the same way: one rank, the scale folded into B, no patterns, only A and B.

PEFT, vLLM, SGLang and llama.cpp's converter differ in which fields of the config they read. Here alpha is the rank, so
that the scale is 1 for all of them, also for those that ignore it; lower ranks are padded with zeros.

Legend: R rank, I in, O out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch.nn.functional as F

from lorakit.core.exchange import Exchange, Update
from lorakit.core.patterns import beyond
from lorakit.core.values import Value
from lorakit.errors import BadAdapterFile
from lorakit.interop._folding import error, folded
from lorakit.interop.format import Told
from lorakit.interop.formats import peft

TITLE = "portable PEFT folder"
KEPT = ("target_modules", "lora_dropout", "fan_in_fan_out")  # of a config
NARROWED = ("layers_to_transform", "exclude_modules")  # by which target_modules means fewer layers


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
    errors = [error(update, update.scale) for update in exchange.updates]
    told_of = exchange.config
    kept = [key for key in KEPT if key in told_of and not (key == KEPT[0] and any(map(told_of.get, NARROWED)))]
    plain = Exchange(
        format=exchange.format,
        updates=tuple(_padded(_unscaled(update), rank) for update in exchange.updates),
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
            yield f"{update.path} has a bias of B, which not every reader knows"
        if update.form in ("experts", "convolution"):
            yield f"{update.path} adapts {update.form}, which not every reader knows; {merge}"
        if told.rank and update.rank > told.rank:
            yield f"{update.path} has rank {update.rank}, above the {told.rank} asked for; compress it first"
    if exchange.whole:
        count, some = len(exchange.whole), ", ".join(list(exchange.whole)[:3])
        yield f"it holds {count} tensors in place of the base's own ({some}), which not every reader knows; {merge}"


def _unscaled(update: Update) -> Update:
    """Scale 1."""
    b = folded(update, update.scale)
    return replace(update, b=b, diagonal=None, alpha=float(update.rank), rooted=False)


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
