"""Write the base with an adapter folded in, as a complete model folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import Progress

from lorakit import models
from lorakit.cli._adapter import base_of
from lorakit.cli._show import console, say, size
from lorakit.interop import merge_checkpoint


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which adapter to merge, into what, and where to."""

    adapter: str = field(metadata={"positional": True})  # folder of the adapter
    out: str  # a folder that does not exist yet
    base: str | None = None  # the adapter's base; None: the one that it names
    any_base: bool = False  # merge into another base than the adapter was trained on


def main(options: Options) -> None:
    """Merge tensor by tensor."""
    adapter, out = Path(options.adapter), Path(options.out)
    base = models.folder(base_of(adapter, options.base))
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("merging", total=None)
        merge_checkpoint(
            base, adapter, out, any_base=options.any_base,
            watch=lambda name, number, total: progress.update(task, completed=number, total=total),
        )  # fmt: skip
    weights = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    say(f"{out} holds the merged model ({size(weights)}); AutoModel.from_pretrained({str(out)!r}) loads it")
