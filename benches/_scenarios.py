"""What the libraries train on, and for each kind of it the model, the targets and the peers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorakit.data import Data, Encoded, encode, open_data

PEERS = ("peft", "trainer", "trl", "full")
TARGETS = {"qv": ("attn.q", "attn.v"), "all": ("linear",)}
DEVELOPMENT = "devset.csv"  # of E2E, where a folder is given
EIGHT_BILLION = dict(  # Llama 3.1's
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    tie_word_embeddings=False,
)
Examples = Sequence[Encoded]


@dataclass(frozen=True)
class Scenario:
    """Examples, how many come together, and what is compared on them."""

    examples: Callable[[Any, Path | None], Examples]  # of a tokenizer, and where E2E is
    rows: int = 16
    targets: Sequence[str] = tuple(TARGETS)
    peers: Sequence[str] = PEERS
    shape: Mapping[str, Any] | None = None  # of a Llama with random weights; None: SmolLM2
    checkpointing: Literal["none", "blocks"] = "none"


def equal(tokenizer: Any, e2e: Path | None) -> Examples:
    """64 random tokens each, all of them learned but the first."""
    chance = random.Random(0)
    return [Encoded(tokens(chance, 64), 1) for _ in range(400)]


def ragged(tokenizer: Any, e2e: Path | None) -> Examples:
    """25 to 176 random tokens, of which the second half is learned; a random batch is half padding."""
    chance = random.Random(0)
    lengths = [between(chance.lognormvariate(4.3, 0.45), 25, 176) for _ in range(800)]
    return [Encoded(tokens(chance, length), length // 2) for length in lengths]


def long(tokenizer: Any, e2e: Path | None) -> Examples:
    """Likewise 128 to 1024 random tokens."""
    chance = random.Random(0)
    lengths = [between(chance.lognormvariate(6.1, 0.55), 128, 1024) for _ in range(200)]
    return [Encoded(tokens(chance, length), length // 2) for length in lengths]


def described(tokenizer: Any, e2e: Path | None) -> Examples:
    """E2E's pairs; without the set, as many contexts with as many and as long references, of random tokens."""
    if e2e is not None:
        file = e2e / DEVELOPMENT if e2e.is_dir() else e2e
        return encode(open_data(Data(source="e2e", path=str(file))).train, tokenizer, 512)
    chance, found = random.Random(0), []
    for _ in range(492):
        context, name = tokens(chance, between(chance.gauss(41, 7.8), 18, 51)), tokens(chance, 4)
        for _ in range(between(4 + chance.lognormvariate(0.9, 1), 2, 43)):
            opening = name if chance.random() < 0.6 else ()  # many references begin with what they describe
            rest = tokens(chance, between(chance.gauss(0.9 * len(context) - 8, 7), 8, 80) - len(opening))
            found.append(Encoded(context + opening + rest, len(context)))
    return found


def reviews(tokenizer: Any, e2e: Path | None) -> Examples:
    """Film reviews, of which the label is learned."""
    return encode(open_data(Data(source="reviews", train_examples=1600)).train, tokenizer, 512)


def tokens(chance: random.Random, count: int) -> tuple[int, ...]:
    """Random ones, of words."""
    return tuple(chance.choices(range(100, 40000), k=count))


def between(value: float, least: int, most: int) -> int:
    """The nearest whole number in these bounds."""
    return min(max(round(value), least), most)


_EIGHT = Scenario(long, rows=8, targets=("all",), peers=("peft",), shape=EIGHT_BILLION)
SCENARIOS = {
    "a": Scenario(equal, rows=8),
    "b": Scenario(ragged),
    "c": Scenario(described),
    "d": Scenario(reviews),
}
ON_CUDA = {"8b": _EIGHT, "8b-blocks": replace(_EIGHT, checkpointing="blocks")}
