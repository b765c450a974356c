"""Adapters side by side: whether they belong together, and the same division of their fused layers."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch

from lorakit.core.exchange import Exchange, Update
from lorakit.core.fingerprint import ROUGH, TOLERANCE, fingerprint_faults
from lorakit.errors import BadAdapterFile, BadMethod


def alike(adapters: Mapping[str, Exchange]) -> dict[str, Exchange]:
    """The adapters, by name, if they are of one base; a fused layer that they divide differently is left whole in all.

    Bases are told apart by the samples of their weights where the files hold some of the same layers, else by the last
    part of their names: a copy in another folder is the same base.

    Raises:
        BadMethod: other bases, or layers of other shapes; every difference is listed.
        BadAdapterFile: an adapter changes a layer twice.
    """
    faults = [fault for one, other in combinations(adapters, 2) for fault in _other_base(adapters, one, other)]
    owners: dict[str, tuple[str, Update]] = {}
    divided: set[str] = set()
    for name, adapter in adapters.items():
        refuse_twice(adapter, name)
        for update in adapter.updates:
            owner, known = owners.setdefault(update.path, (name, update))
            if _shape(known) != _shape(update):
                faults.append(f"{update.path} is {_told(known)} in {owner} and {_told(update)} in {name}")
            elif _parts(known) != _parts(update):
                divided.add(update.path)
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise BadMethod(f"these adapters do not belong together: {shown}")
    return {name: _undivided(adapter, divided) for name, adapter in adapters.items()}


def refuse_twice(adapter: Exchange, where: object) -> None:
    """Refuse an adapter with two updates of one layer, of which one would be lost.

    Raises:
        BadAdapterFile: it has such.
    """
    paths = Counter(update.path for update in adapter.updates)
    if twice := [path for path, count in paths.items() if count > 1]:
        raise BadAdapterFile(where, [f"it changes {path} twice" for path in twice])


def _shape(update: Update) -> tuple[str, tuple[int, ...]]:
    """The form of a layer, and the shape of its weight."""
    if update.form == "experts":
        return update.form, (update.a.shape[0], update.b.shape[1], update.a.shape[2])
    return update.form, (update.b.shape[0], *update.a.shape[1:])


def _told(update: Update) -> str:
    """The shape of a layer, for a message."""
    form, shape = _shape(update)
    return f"{' x '.join(map(str, shape))}{'' if form == 'linear' else f' ({form})'}"


def _parts(update: Update) -> set[Any]:
    return {(part.role, part.where) for part in update.slices}


def _undivided(adapter: Exchange, paths: set[str]) -> Exchange:
    changed = tuple(replace(each, slices=()) if each.path in paths else each for each in adapter.updates)
    return replace(adapter, updates=changed)


def _other_base(adapters: Mapping[str, Exchange], one: str, other: str) -> Iterator[str]:
    bases, samples = zip(*((adapters[name].base, _samples(adapters[name])) for name in (one, other)), strict=True)
    shared = samples[0].keys() & samples[1].keys()
    differing = [path for path in sorted(shared) if not _is_same(samples[0][path], samples[1][path])]
    if differing:
        yield f"{one} and {other} were trained on bases with other weights (first: {differing[0]})"
    elif not shared and all(bases) and len({_last(base) for base in bases}) > 1:
        yield f"{one} belongs to the base {bases[0]}, {other} to {bases[1]}"


def _last(base: str) -> str:
    return base.rstrip("/").rsplit("/", 1)[-1].casefold()


def _samples(adapter: Exchange) -> Mapping[str, Any]:
    base = (adapter.header or {}).get("base")
    return base["samples"] if isinstance(base, Mapping) and not fingerprint_faults(base) else {}


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two samples are of one weight, up to bf16's rounding, or to quantisation where that was in play."""
    if one["shape"] != other["shape"]:
        return False
    mine, theirs = (
        torch.frombuffer(bytearray(base64.b64decode(each["bf16"])), dtype=torch.bfloat16).float()
        for each in (one, other)
    )
    if "bits" in one or "bits" in other:
        return bool((mine - theirs).norm() <= ROUGH * mine.norm())
    return torch.allclose(mine, theirs, rtol=TOLERANCE, atol=1e-6)
