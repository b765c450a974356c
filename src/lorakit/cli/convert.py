"""Write an adapter in another tool's format."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lorakit.cli._show import say, size
from lorakit.errors import LorakitError
from lorakit.interop import Told, convert


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which adapter, where to, and in which format."""

    adapter: str = field(metadata={"positional": True})  # a PEFT folder, or another tool's file
    out: str  # a file or folder that does not exist yet
    to: str = "peft"  # peft, portable, gguf, loralib, kohya or diffusers
    alpha: float | None = None  # the updates are scaled by alpha / rank, where the file does not say
    base: str | None = None  # the adapter's base, where a format needs to know it: its name, folder or GGUF file
    enabled: tuple[str, ...] = ()  # of loralib's fused layers: True or False for each part, e.g. True,False,True
    rank: int | None = None  # the one rank of a portable folder; None: the largest there is


def main(options: Options) -> None:
    """Convert, and say how exact the result is."""
    out = Path(options.out)
    words = [word.strip().lower() for word in options.enabled]
    if not set(words) <= {"true", "false"}:
        raise LorakitError(f"--enabled takes True or False for each part, not {','.join(options.enabled)}")
    enabled = tuple(word == "true" for word in words) or None
    told = Told(alpha=options.alpha, base=options.base, rank=options.rank, enabled=enabled)
    notes = convert(options.adapter, out, options.to, told)
    for note in notes:
        say(note)
    files = [path for path in ([out] if out.is_file() else sorted(out.iterdir())) if path.is_file()]
    say(f"{out} holds the adapter as {options.to} ({size(sum(path.stat().st_size for path in files))})")
