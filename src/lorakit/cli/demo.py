"""Adapt a real model on this machine, and see what an adapter is good for."""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.cli import _demo


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much of it."""

    quick: bool = False  # a minute's worth: fewer examples, and results that say so
    out: str = "out/demo"  # folder of the adapters, pictures and results; what an earlier demo left there is replaced


def main(options: Options) -> None:
    """Run the demo and print its story."""
    _demo.tell(options.out, quick=options.quick)
