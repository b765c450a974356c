"""Measure an adapter and its base side by side on test examples."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.cli._adapter import loaded, recorded
from lorakit.cli._show import console, sides
from lorakit.data import Data, open_data
from lorakit.errors import LorakitError
from lorakit.reproduce.measures import Evaluate, compare


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and where."""

    adapter: str = field(metadata={"positional": True})  # folder of the adapter
    base: str | None = None  # its base; None: the one that the adapter names
    data: str | None = None  # a data set; None: the one that the adapter was trained on
    test_examples: int | None = None  # how many to measure on; None: all
    evaluate: Evaluate = field(default_factory=Evaluate)  # what to measure
    json: bool = False  # print the numbers as JSON


def main(options: Options) -> None:
    """Load base and adapter, and print the measures of both."""
    adapter = Path(options.adapter)
    model, tokenizer, name = loaded(adapter, options.base)
    told: dict[str, Any] = recorded(adapter, "data") if options.data is None else {"source": options.data}
    if not told:
        raise LorakitError(f"{adapter} has no run.json that names its data; give --data")
    told["test_examples"] = options.test_examples or told.get("test_examples")
    told["labels"] = tuple(told.get("labels", ()))
    data = open_data(Data(**told), tokenizer)
    found = compare(model, tokenizer, data, options.evaluate, {"base": None, "adapter": name})
    if options.json:
        console.print_json(json.dumps(found))
    else:
        sides(f"{len(data.test):,} test examples of {data.name}", found)
