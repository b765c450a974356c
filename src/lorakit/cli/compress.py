"""Write a smaller adapter: of each update the directions that matter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.analyse.compress import Choice, compress
from lorakit.analyse.ranks import at_most, keeping, within_parameters
from lorakit.cli._adapter import base_of, data_of
from lorakit.cli._declare import OVERRIDES
from lorakit.cli._show import say, sides
from lorakit.data import Data, open_data
from lorakit.errors import LorakitError
from lorakit.interop import Told, read, write
from lorakit.interop.reading import refuse_existing
from lorakit.reproduce.measures import Evaluate
from lorakit.reproduce.study import losses


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which adapter, how small, and where to."""

    adapter: str = field(metadata={"positional": True})  # a PEFT folder, or another tool's file
    out: str  # a folder that does not exist yet
    keep: float | None = None  # share of ‖ΔW‖² that each matrix keeps; 0.99 where nothing else is given
    rank: int | None = None  # instead: the largest rank of a matrix
    parameters: int | None = None  # instead: numbers in all, given where they keep most
    alpha: float | None = None  # the updates are scaled by alpha / rank, where the file does not say
    base: str | None = None  # the adapter's base, to measure the change in loss; None: the one that it names
    measure: bool = True  # compare the loss on test examples before and after
    data: dict[str, Any] = field(default_factory=dict, metadata={OVERRIDES: Data})  # else as it was in training
    evaluate: Evaluate = field(default_factory=Evaluate)  # what to measure besides


def main(options: Options) -> None:
    """Compress, measure what it costs, write, and say what is left."""
    adapter, out = Path(options.adapter), Path(options.out)
    choose = _choice(options)
    refuse_existing(out)
    data = open_data(data_of(adapter, options.data)) if options.measure else None
    base = base_of(adapter, options.base) if options.measure else None
    exchange = read(adapter, Told(alpha=options.alpha, base=options.base))
    found = compress(exchange, choose, where=adapter)
    told = None
    if data is not None and base is not None:
        told = losses(base, {"before": exchange, "after": found.exchange}, data, options.evaluate)
    write(found.exchange, out, "peft")
    before, after = found.parameters
    say(f"{out} holds {after:,} of {before:,} numbers; the updates differ by {100 * found.lost:.2g} % in norm")
    if found.dropped:
        say(f"{len(found.dropped)} matrices got no rank: {', '.join(found.dropped[:4])}")
    if data is not None and told is not None:
        sides(f"{len(data.test):,} test examples of {data.name}", told)


def _choice(options: Options) -> Choice:
    given = [name for name in ("keep", "rank", "parameters") if getattr(options, name) is not None]
    if len(given) > 1:
        raise LorakitError(f"--{given[0]} and --{given[1]} both say how small; give one of them")
    if options.rank is not None:
        return at_most(options.rank)
    if options.parameters is not None:
        return within_parameters(options.parameters)
    return keeping(0.99 if options.keep is None else options.keep)
