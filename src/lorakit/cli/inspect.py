"""Say what an adapter holds, or which adapters a folder holds."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorakit.cli._show import console, number_of, size, table
from lorakit.core.exchange import Exchange, Update
from lorakit.core.files import TENSORS
from lorakit.interop import Told, format_of, read
from lorakit.interop.listing import SAFETENSORS, Listed, described, is_adapter, listing, size_of
from lorakit.interop.shards import opened

MANY = ("adapter", "format", "method", "targets", "base", "rank", "scale", "parameters", "size")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which adapter, and how to tell of it."""

    adapter: str = field(metadata={"positional": True})  # folder of the adapter, its file, or a folder of many
    alpha: float | None = None  # the updates are scaled by alpha / rank, where the file does not say
    base: str | None = None  # the adapter's base, where a format needs to know it: its name, folder or GGUF file
    json: bool = False  # print all of it as JSON


def main(options: Options) -> None:
    """Print the method, the base, the layers and the tensors; of a folder of adapters, a line each."""
    path, told = Path(options.adapter), Told(alpha=options.alpha, base=options.base)
    many = listing(path, told) if os.path.isdir(path) and not is_adapter(path) else []
    if not many:
        _one(path, read(path, told), as_json=options.json)
    elif options.json:
        console.print_json(json.dumps([asdict(each) for each in many]))
    else:
        _many(path, many)


def _many(path: Path, many: Sequence[Listed]) -> None:
    broken = [[each.name, "; ".join(each.faults)] for each in many if each.faults]
    table(f"{path}: {number_of(len(many))} adapters", MANY, [_line(each) for each in many if not each.faults], texts=5)
    if broken:
        table(f"{number_of(len(broken))} of them cannot be loaded", ["adapter", "why"], broken, texts=2)


def _line(each: Listed) -> list[object]:
    words = (each.name, each.format, each.method, " ".join(each.targets), each.base or "")
    return [*words, _span(each.ranks), _span(each.scales), each.parameters, size(each.bytes)]


def _span(values: Sequence[float]) -> str:
    """One value, or the least and the greatest.

    >>> _span([8]), _span([0.5, 1.0, 2.0]), _span([])
    ('8', '0.5-2', '')
    """
    return "-".join(f"{value:.4g}" for value in sorted({min(values), max(values)})) if values else ""


def _one(path: Path, found: Exchange, *, as_json: bool) -> None:
    line, header = described(found, name=str(path), format=format_of(path).TITLE, size=size_of(path)), found.header
    if as_json:
        console.print_json(json.dumps(asdict(line) | {"config": dict(found.config), "lorakit": header}))
        return
    rows: list[list[object]] = [
        ["format", line.format],
        ["written by", f"lorakit {header['lorakit']}" if header else "another program"],
        ["base", line.base or "not named"],
        ["base verified by", f"{len(header['base']['samples'])} sampled matrices" if header else "nothing in the file"],
        *(_methods(header["method"]) if header else [["method", line.method]]),
        *_besides(found),
        ["parameters", line.parameters],
        ["file", size(line.bytes)],
    ]
    table(str(path), ["", ""], rows, texts=2)
    if found.updates:
        layers = Counter(_layer(update) for update in found.updates)
        shown = [[*layer, count] for layer, count in layers.items()]
        table("layers", ["layer", "kind", "rank", "scale", "out x in", "count"], shown, texts=2)
    _tensors(path / TENSORS if path.is_dir() else path)


def _methods(told: dict[str, Any]) -> list[list[object]]:
    """A row of the method, and one of each that it combines."""
    parts = told.get("parts", [])
    named = {"method": {key: value for key, value in told.items() if key != "parts"}}
    named |= {f"part {number}": part for number, part in enumerate(parts, 1)}
    return [[name, _method(each)] for name, each in named.items()]


def _method(told: dict[str, Any]) -> str:
    said = {key: value for key, value in told.items() if key != "name" and value not in ({}, [], (), "none", 0.0)}
    return ", ".join([told["name"], *(f"{key} {value}" for key, value in said.items())])


def _besides(found: Exchange) -> Iterator[list[object]]:
    """What it has besides of B A."""
    parts = {
        "magnitudes (DoRA)": sum(update.magnitude is not None for update in found.updates),
        "biases of B": sum(update.shift is not None for update in found.updates),
        "trained biases": sum(name.endswith(".bias") for name in found.whole),
        "tensors of its own": sum(not name.endswith(".bias") for name in found.whole),
    }
    yield from ([words, count] for words, count in parts.items() if count)


def _layer(update: Update) -> tuple[str, str, int, str, str]:
    shape = " x ".join(map(str, update.sides))
    return _role(update.path), update.form, update.rank, f"{update.scale:.4g}", shape


def _tensors(file: Path) -> None:
    """The tensors as they stand in a safetensors file."""
    if file.suffix == SAFETENSORS and file.is_file():
        kinds = Counter((_role(key), each.shape, each.dtype) for key, each in opened(file)[0].items())
        shown = [[role, str(n), " x ".join(map(str, shape)), dtype] for (role, shape, dtype), n in kinds.items()]
        table("tensors", ["tensor", "count", "shape", "dtype"], shown)


def _role(key: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in key.split("."))
