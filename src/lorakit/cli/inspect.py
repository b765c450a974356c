"""Say what an adapter folder holds."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.cli._show import console, number_of, size, table
from lorakit.core import files


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which adapter, and how to tell of it."""

    adapter: str = field(metadata={"positional": True})  # folder of the adapter
    json: bool = False  # print the header as JSON


def main(options: Options) -> None:
    """Print the method, the base and the tensors."""
    folder = Path(options.adapter)
    config, header, tensors = files.read(folder)
    if options.json:
        console.print_json(json.dumps({"config": config, "lorakit": header}))
        return
    weight = (folder / files.TENSORS).stat().st_size
    rows: list[list[object]] = [
        ["written by", f"lorakit {header['lorakit']}" if header else "PEFT"],
        ["base", str(config.get("base_model_name_or_path") or "not named")],
        ["base verified by", f"{len(header['base']['samples'])} sampled matrices" if header else "nothing in the file"],
        *(_methods(header["method"]) if header else [["method", str(config.get("peft_type"))]]),
        ["parameters", sum(value.numel() for value in tensors.values())],
        ["file", f"{size(weight)}, {number_of(len(tensors))} tensors"],
    ]
    table(str(folder), ["", ""], rows, texts=2)
    kinds = Counter((_role(key), tuple(value.shape), str(value.dtype)) for key, value in tensors.items())
    shown = [[role, str(n), " x ".join(map(str, shape)), dtype[6:]] for (role, shape, dtype), n in kinds.items()]
    table("tensors", ["layer", "count", "shape", "dtype"], shown)


def _methods(told: dict[str, Any]) -> list[list[object]]:
    """A row of the method, and one of each that it combines."""
    parts = told.get("parts", [])
    named = {"method": {key: value for key, value in told.items() if key != "parts"}}
    named |= {f"part {number}": part for number, part in enumerate(parts, 1)}
    return [[name, _method(each)] for name, each in named.items()]


def _method(told: dict[str, Any]) -> str:
    said = {key: value for key, value in told.items() if key != "name" and value not in ({}, [], (), "none", 0.0)}
    return ", ".join([told["name"], *(f"{key} {value}" for key, value in said.items())])


def _role(key: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in key.split("."))
