"""What the formats of a single file share: its tensors by name, an update out of them, and what it has no words for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from lorakit.core.atomic import new_file
from lorakit.core.exchange import Exchange, Form, Update
from lorakit.core.patterns import beyond
from lorakit.core.pickles import SUFFIXES, read_pickle
from lorakit.core.values import Value
from lorakit.errors import BadAdapterFile, BadModel, LorakitError
from lorakit.interop._fitting import misfit
from lorakit.interop.shards import opened, write_values

SAFETENSORS = ".safetensors"
_FIELDS = {"magnitude": "a magnitude (DoRA)", "shift": "a bias of B", "diagonal": "a diagonal between B and A"}


def tensors_in(path: Path, within: Sequence[str] = ()) -> tuple[dict[str, Value], dict[str, str]]:
    """A file's tensors by name, and the texts in its header; `within` is `read_pickle`'s.

    Raises:
        BadAdapterFile: the file is damaged, or a pickle of something besides tensors.
    """
    if path.suffix in SUFFIXES:
        return read_pickle(path, within), {}
    try:
        entries, metadata = opened(path)
    except BadModel as error:
        raise BadAdapterFile(path, [str(error)]) from error
    return {key: entry.value for key, entry in entries.items()}, metadata


def names_in(path: Path, within: Sequence[str] = ()) -> Collection[str]:
    """The names of a file's tensors; none where it cannot be read."""
    if not path.is_file() or path.suffix not in (SAFETENSORS, *SUFFIXES):
        return ()
    try:
        return tensors_in(path, within)[0]
    except LorakitError:
        return ()


def number(value: Value) -> float:
    """A file's single number; NaN where it is none."""
    return float(value.read()) if value.numel == 1 else math.nan


def update_of(path: str, layer: Mapping[str, Value], alpha: float, faults: list[str]) -> Update | None:
    """A linear layer's or convolution's update out of its `a`, `b`, `magnitude` and `shift`; None after a fault."""
    if found := misfit(layer, (2, 4)):
        faults.append(f"{path} {found}")
    elif not math.isfinite(alpha):
        faults.append(f"{path} has an alpha that is no finite number")
    else:
        a, b = layer["a"], layer["b"]
        form: Form = "linear" if len(a.shape) == 2 else "convolution"
        return Update(path, a, b, alpha, form=form, magnitude=layer.get("magnitude"), shift=layer.get("shift"))
    return None


def rank_in(layer: Mapping[str, Value]) -> int:
    """The rows of a layer's A; 1 where it has none, which `update_of` then says."""
    return next(iter(layer["a"].shape), 1) if "a" in layer else 1


def unsaid(exchange: Exchange, title: str, forms: Collection[str], fields: Collection[str]) -> Iterator[str]:
    """What of an adapter a format has no words for, where it knows these forms of updates and these fields."""
    yield from beyond(exchange.config)
    if not exchange.updates:
        yield "it has no low-rank updates"
    for update in exchange.updates:
        if update.form not in forms:
            yield f"{update.path} adapts {update.form}, which a {title} cannot express"
        for field, words in _FIELDS.items():
            if field not in fields and getattr(update, field) is not None:
                yield f"{update.path} has {words}, which a {title} cannot express; merge it into its base instead"
    if "whole" not in fields:
        yield from (f"{name} stands in place of the base's, which a {title} cannot express" for name in exchange.whole)


def plain_alpha(update: Update) -> float:
    """The alpha that gives an update its scale as alpha / rank.

    >>> import torch; from lorakit.core.values import value_of
    >>> plain_alpha(Update("q", value_of(torch.ones(4, 3)), value_of(torch.ones(3, 4)), alpha=2.0, rooted=True))
    4.0
    """
    return update.scale * update.rank if update.rooted else update.alpha


def texts(exchange: Exchange, own: str) -> dict[str, str]:
    """What a header says that is true of a file in the format `own`, too: of another, how the adapter was trained."""
    kept = exchange.config if exchange.format == own else [key for key in exchange.config if key.startswith("ss_")]
    return {key: text for key in kept if isinstance(text := exchange.config[key], str)}


def write_safetensors(out: Path, values: Mapping[str, Value], metadata: Mapping[str, str]) -> None:
    """Write the file in one step.

    Raises:
        BadAdapterFile: a value that is no finite real number.
        LorakitError: `out` does not end in .safetensors, exists, or cannot be written.
    """
    if out.suffix != SAFETENSORS:
        raise LorakitError(f"{out} should be a file whose name ends in {SAFETENSORS}")
    with new_file(out) as path:
        write_values(path, values, metadata)
