"""Write the base with an adapter folded in, as a complete model folder or as GGUF."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import Progress

from lorakit import models
from lorakit.cli._adapter import base_of
from lorakit.cli._show import console, say, size
from lorakit.interop import Told, merge_checkpoint, merge_gguf, read


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which adapter to merge, into what, and where to."""

    adapter: str = field(metadata={"positional": True})  # folder of the adapter
    out: str  # a folder, or a file that ends in .gguf, that does not exist yet
    base: str | None = None  # the adapter's base; None: the one that it names
    any_base: bool = False  # merge into another base than the adapter was trained on
    floats: bool = False  # into GGUF: write changed layers in 16 bits, as few bits can round the adapter away


def main(options: Options) -> None:
    """Merge tensor by tensor."""
    adapter, out = Path(options.adapter), Path(options.out)
    name = base_of(adapter, options.base)
    if out.suffix == ".gguf":
        return _into_gguf(adapter, models.gguf_file(name), out, floats=options.floats)
    base = models.folder(name)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("merging", total=None)
        merge_checkpoint(
            base, adapter, out, any_base=options.any_base,
            watch=lambda name, number, total: progress.update(task, completed=number, total=total),
        )  # fmt: skip
    weights = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    say(f"{out} holds the merged model ({size(weights)}); AutoModel.from_pretrained({str(out)!r}) loads it")


def _into_gguf(adapter: Path, base: Path, out: Path, *, floats: bool) -> None:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("merging", total=None)
        notes = merge_gguf(
            base, read(adapter, Told(base=str(base))), out, floats=floats,
            watch=lambda name, number, total: progress.update(task, completed=number, total=total),
        )  # fmt: skip
    for note in notes:
        say(note)
    say(f"{out} holds the merged model ({size(out.stat().st_size)}); llama.cpp loads it")
