"""PEFT folders: `adapter_config.json` beside `adapter_model.safetensors`, or beside an older `adapter_model.bin`.

Reading keeps every tensor as it is. Writing gives names, patterns and a config that can be read in one way only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.core.atomic import new_folder
from lorakit.core.checked import misfits
from lorakit.core.exchange import Exchange
from lorakit.core.files import CONFIG, PICKLE, TENSORS
from lorakit.core.header import header_faults
from lorakit.core.keys import PREFIX, bare
from lorakit.core.patterns import parsed_config, pattern_faults
from lorakit.core.pickles import read_pickle
from lorakit.core.values import Value
from lorakit.errors import BadAdapterFile, BadModel
from lorakit.interop import _peft_layers as layers
from lorakit.interop.format import Told
from lorakit.interop.shards import opened, write_values

TITLE = "PEFT folder"
READ = {
    "peft_type": str | None,
    "r": int | None,
    "init_r": int | None,
    "lora_alpha": float | None,
    "rank_pattern": dict[str, Any] | None,
    "alpha_pattern": dict[str, float] | None,
    "use_rslora": bool | None,
    "use_dora": bool | None,
    "lora_bias": bool | None,
    "lora_dropout": float | None,
    "fan_in_fan_out": bool | None,
    "bias": str | None,
    "target_modules": list[str] | str | None,
    "target_parameters": list[str] | None,
    "modules_to_save": list[str] | None,
    "base_model_name_or_path": str | None,
    "task_type": str | None,
}


def recognises(path: Path) -> bool:
    """Whether a folder holds PEFT's tensors."""
    return path.is_dir() and ((path / TENSORS).is_file() or (path / PICKLE).is_file())


def read(path: Path, told: Told) -> Exchange:
    """What a folder holds, each tensor as it stands there.

    Raises:
        BadAdapterFile: every fault of its header, config and names.
    """
    values, metadata = _values(path)
    config, header, faults = _told(path, metadata)
    named = {bare(key): value for key, value in values.items()}
    if len(named) < len(values):
        faults.append("it names a tensor twice, with and without PEFT's prefix")
    if faults:
        raise BadAdapterFile(path, faults)
    updates, whole, faults = layers.read(config, header, named)
    whole = whole if updates else dict(values)  # of another type of adapter: as it stands
    if faults:
        raise BadAdapterFile(path, faults)
    return Exchange(
        format="peft",
        updates=updates,
        whole=whole,
        base=told.base or config.get("base_model_name_or_path"),
        task=config.get("task_type"),
        config=config,
        header=header,
    )


def _values(path: Path) -> tuple[dict[str, Value], dict[str, str]]:
    if not (path / TENSORS).is_file():
        return read_pickle(path / PICKLE), {}
    try:
        entries, metadata = opened(path / TENSORS)
    except BadModel as error:
        raise BadAdapterFile(path, [str(error)]) from error
    return {key: entry.value for key, entry in entries.items()}, metadata


def _told(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
    """Config, header, and what is wrong with them."""
    try:
        config = parsed_config((path / CONFIG).read_text("utf-8")) if (path / CONFIG).is_file() else {}
        header = json.loads(metadata["lorakit"]) if "lorakit" in metadata else None
    except (ValueError, OSError, RecursionError) as error:
        return {}, None, [f"it is damaged ({error})"]
    faults = [] if "lorakit" not in metadata else header_faults(header)
    faults += misfits(config, READ, f"its {CONFIG}") or list(pattern_faults(config))
    if not config and header is None:
        faults.append(f"it has no {CONFIG}")
    return config, header, faults


def write(exchange: Exchange, out: Path, told: Told) -> list[str]:
    """A folder of the same tensors: nothing is computed.

    Raises:
        BadAdapterFile: something that PEFT has no words for.
        LorakitError: the place cannot be written.
    """
    config, tensors = layers.written(exchange)
    config |= {"base_model_name_or_path": told.base or exchange.base}
    metadata = {} if exchange.header is None else {"lorakit": _compact(exchange.header)}
    with new_folder(out) as folder:
        prefix = PREFIX if exchange.updates else ""
        write_values(folder / TENSORS, {prefix + name: value for name, value in tensors.items()}, metadata)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return []


def _compact(header: Mapping[str, Any]) -> str:
    return json.dumps(header, sort_keys=True, separators=(",", ":"))
