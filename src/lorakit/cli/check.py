"""Say what another program refuses of an adapter or gets wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lorakit.cli._show import console, say, table
from lorakit.interop import Told, read
from lorakit.interop.check import Finding, check, is_usable, program


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which adapter, and for which program."""

    adapter: str = field(metadata={"positional": True})  # an adapter's folder or file, in any format
    for_: str  # vllm, sglang, llama.cpp or peft
    alpha: float | None = None  # the updates are scaled by alpha / rank, where the file does not say
    base: str | None = None  # the adapter's base, where a format needs to know it: its name, folder or GGUF file
    json: bool = False  # print the findings as JSON


def main(options: Options) -> int:
    """Print the findings; 1 if the program refuses the adapter or computes something else with it."""
    path, title, told = Path(options.adapter), program(options.for_).TITLE, Told(alpha=options.alpha, base=options.base)
    found = check(read(path, told), path, options.for_, told)
    if options.json:
        console.print_json(json.dumps({"for": title, "findings": [asdict(each) for each in found]}))
    elif found:
        _show(f"{path} for {title}", found)
    else:
        say(f"{title} takes {path} as it is")
    return 0 if is_usable(found) else 1


def _show(title: str, found: Sequence[Finding]) -> None:
    """A table, and below it the commands, which can so be copied whole."""
    mends = list(dict.fromkeys(each.mend for each in found if each.mend))
    table(title, ["", "what it does", "mend"], [
        [each.grade, each.what, str(mends.index(each.mend) + 1) if each.mend else ""] for each in found
    ], texts=2)  # fmt: skip
    for number, mend in enumerate(mends, 1):
        say(f"mend {number}: {mend}")
