"""What all formats have in common: each is one file in `formats/`, found by its name.

Such a file has a TITLE (what people call the format), `recognises(path)`, `read(path, told)` and, where lorakit writes
it, `write(exchange, out, told)`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Told:
    """What the caller knows and a file may not say."""

    alpha: float | None = None  # the updates are scaled by alpha / rank
    base: str | None = None  # the base's name, folder or GGUF file
    rank: int | None = None  # the one rank that all updates get, where a format wants one
    enabled: tuple[bool, ...] | None = None  # which parts of a fused layer are adapted (enable_lora of loralib)
