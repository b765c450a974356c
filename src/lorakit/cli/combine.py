"""Make one adapter of several, by weights of either sign."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lorakit.analyse.merging import merge_adapters
from lorakit.analyse.recipes import recipe
from lorakit.cli._show import say
from lorakit.errors import LorakitError
from lorakit.interop import Told, read, write
from lorakit.interop.reading import refuse_existing
from lorakit.reproduce.study import labels


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which adapters, how to combine them, and where to write."""

    adapters: tuple[str, ...] = field(metadata={"positional": True})  # PEFT folders, or other tools' files
    out: str  # a folder that does not exist yet
    by: str = "concatenation"  # concatenation, svd, linear, ties, dare or dare-ties
    weights: tuple[str, ...] = ()  # a number for each adapter, negative to take away; none given: 1 for each
    rank: int | None = None  # of the result, by svd, ties and dare; None: that of the largest adapter
    density: float | None = None  # share of entries that ties and dare keep
    election: str | None = None  # by what ties elects signs: mass or frequency
    seed: int | None = None  # of what dare drops
    alpha: float | None = None  # the updates are scaled by alpha / rank, where a file does not say


def main(options: Options) -> None:
    """Combine, and say how near the result is to the weighted sum."""
    refuse_existing(Path(options.out))
    names = labels(options.adapters)
    adapters = {n: read(place, Told(alpha=options.alpha)) for n, place in zip(names, options.adapters, strict=True)}
    chosen = {name: getattr(options, name) for name in ("rank", "density", "election", "seed")}
    by = recipe(options.by, **{name: value for name, value in chosen.items() if value is not None})
    found = merge_adapters(adapters, dict(zip(names, _weights(options), strict=True)), by)
    write(found.exchange, Path(options.out), "peft")
    for note in found.notes:
        say(note)
    ranks = sorted({update.rank for update in found.exchange.updates})
    say(f"{options.out} holds {' and '.join(names)} by {options.by}, rank {', '.join(map(str, ranks))}")
    say(f"it differs from what is wanted by {100 * found.lost:.2g} % in norm")


def _weights(options: Options) -> list[float]:
    told = options.weights or ("1",) * len(options.adapters)
    if len(told) != len(options.adapters):
        raise LorakitError(f"--weights has {len(told)} numbers for {len(options.adapters)} adapters; give one for each")
    try:
        return [float(each) for each in told]
    except ValueError as error:
        raise LorakitError(f"--weights must be numbers, separated by commas: {error}") from error
