"""The safetensors header of an adapter: what PEFT's format has no words for.

Its `lorakit` entry holds the format's version, method, plan and the base's fingerprint. It is written in sorted order,
without times or paths.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from lorakit.core.checked import misfits
from lorakit.core.fingerprint import fingerprint, fingerprint_faults
from lorakit.core.method import Method, named
from lorakit.core.plan import plan_faults
from lorakit.core.state import Attached
from lorakit.errors import LorakitError
from lorakit.version import VERSION

FORMAT = 1
HEADER = {"format": int, "lorakit": str, "method": dict[str, Any], "plan": list[Any], "base": dict[str, Any]}


def header_of(model: nn.Module, record: Attached) -> dict[str, Any]:
    """The header of one attached adapter."""
    own = [placement.path for placement in record.plan if not placement.is_replaced]
    return {
        "format": FORMAT,
        "lorakit": VERSION,
        "method": record.method.to_json(),
        "plan": [placement.to_json() for placement in record.plan],
        "base": fingerprint(model, own or [placement.path for placement in record.plan]),
    }


def with_header(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """safetensors bytes with sorted metadata: the library writes its entries in the order of a hash."""
    metadata = {"format": "pt", "lorakit": json.dumps(header, sort_keys=True, separators=(",", ":"))}
    raw = to_safetensors(dict(tensors), metadata=metadata)
    (size,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + size])
    text = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


def header_faults(told: Any) -> list[str]:
    """What is wrong with a header, whatever the model."""
    format_ = told.get("format") if isinstance(told, dict) else None
    if isinstance(format_, int) and format_ > FORMAT:
        return [f"it has format {format_}, this lorakit reads up to {FORMAT}; install a newer lorakit"]
    faults = misfits(told, HEADER, "its header", required=HEADER)
    if faults or told["format"] < 1:
        return faults or [f"its header has a bad format: {format_}"]
    method, faults = _method(told["method"])
    kinds = None if method is None else method.kinds_by_part
    return faults + plan_faults(told["plan"], kinds) + fingerprint_faults(told["base"])


def _method(told: Mapping[str, Any]) -> tuple[Method | None, list[str]]:
    """The method that a header tells, or what is wrong with it."""
    try:
        kind, _ = named(str(told.get("name")))
        faults = kind.told_faults(told)
        return (None, faults) if faults else (Method.from_json(told), [])
    except (LorakitError, ValueError, TypeError) as error:
        return None, [f"its method is refused: {error}"]
