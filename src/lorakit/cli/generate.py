"""Let a base with an adapter write on from a prompt."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lorakit.cli._adapter import loaded
from lorakit.errors import LorakitError
from lorakit.evaluate import compare, generate_texts
from lorakit.train.settings import check, counts, seed_rule


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to write on from."""

    adapter: str = field(metadata={"positional": True})  # folder of the adapter
    prompt: str | None = None  # the text to go on from; None: the lines of standard input
    base: str | None = None  # the adapter's base; None: the one that it names
    max_new_tokens: int = 64  # longest text that is written
    temperature: float = 0.0  # 0 takes the likeliest token; above, tokens are drawn
    seed: int = 0  # of the drawing
    beside_base: bool = False  # show what the base writes, too

    def __post_init__(self) -> None:
        warmth = ("temperature", self.temperature, "0 or more", 0 <= self.temperature < math.inf)
        check("generate with", [*counts(max_new_tokens=self.max_new_tokens), warmth, seed_rule(self.seed)])


def main(options: Options) -> None:
    """Print what is written after each prompt."""
    prompts = [options.prompt] if options.prompt is not None else [line.rstrip("\n") for line in sys.stdin]
    if not any(prompts):
        raise LorakitError("there is no prompt; give --prompt, or lines on standard input")
    model, tokenizer, name = loaded(Path(options.adapter), options.base)
    write = partial(
        generate_texts, model, tokenizer, prompts,
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed,
    )  # fmt: skip
    which = {"base": None, "adapter": name} if options.beside_base else {"adapter": name}
    found = compare(model, which, write)
    for number, prompt in enumerate(prompts):
        for side, texts in found.items():
            lead = f"[{side}] " if options.beside_base else ""
            print(f"{lead}{prompt}{texts[number]}")
