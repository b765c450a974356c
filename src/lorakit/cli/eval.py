"""Measure an adapter and its base side by side on test examples."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.cli._adapter import data_of, loaded
from lorakit.cli._declare import OVERRIDES
from lorakit.cli._show import console, sides
from lorakit.data import Data, open_data
from lorakit.reproduce.measures import Evaluate, compare


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and where."""

    adapter: str = field(metadata={"positional": True})  # folder of the adapter
    base: str | None = None  # its base; None: the one that the adapter names
    data: dict[str, Any] = field(default_factory=dict, metadata={OVERRIDES: Data})  # else as it was in training
    evaluate: Evaluate = field(default_factory=Evaluate)  # what to measure
    json: bool = False  # print the numbers as JSON


def main(options: Options) -> None:
    """Load base and adapter, and print the measures of both."""
    adapter = Path(options.adapter)
    model, tokenizer, name = loaded(adapter, options.base)
    data = open_data(data_of(adapter, options.data), tokenizer)
    found = compare(model, tokenizer, data, options.evaluate, {"base": None, "adapter": name})
    if options.json:
        console.print_json(json.dumps(found))
    else:
        sides(f"{len(data.test):,} test examples of {data.name}", found)
