"""One DyLoRA training truncated to each rank, beside LoRA trained at that rank: MiniLM, film reviews, three seeds."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from statistics import mean, stdev
from typing import Any

import torch
from _record import options, record

import lorakit as lk
from lorakit import models
from lorakit.core.method import Method
from lorakit.data import Data, Dataset, collate, encode_texts, open_data, order
from lorakit.evaluate import classification_accuracy
from lorakit.reproduce.run import with_head
from lorakit.train import Feed, Train, run

BASE, NAME, RANKS = "minilm-l6", "reviews", (1, 2, 4, 8)
RATE, ERRORS = 2e-3, 2.0  # pooled standard errors


@dataclass(frozen=True)
class Sizes:
    """How much of everything; None: all test reviews."""

    seeds: tuple[int, ...] = (0, 1, 2)
    train: int = 1600
    epochs: float = 1
    test: int | None = None


def main() -> None:
    """Train, truncate, print, write; a rank that falls behind is reported, and is not an error of the bench."""
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="few examples: shows that it runs, nothing else")
    arguments = parser.parse_args()
    sizes = Sizes((0, 1), 32, 1, 40) if arguments.quick else Sizes()
    found: dict[str, dict[int, list[float]]] = {kind: {rank: [] for rank in RANKS} for kind in ("dylora", "lora")}
    for seed in sizes.seeds:
        for kind, ranks in (("dylora", dylora(sizes, seed)), ("lora", lora(sizes, seed))):
            for rank, accuracy in ranks.items():
                found[kind][rank].append(accuracy)
                print(f"seed {seed}, {kind} at rank {rank}: {accuracy:.4f}", flush=True)
    rows = {rank: compared(found["dylora"][rank], found["lora"][rank]) for rank in RANKS}
    record("dylora", {"quick": arguments.quick, "base": BASE, "rate": RATE, "sizes": asdict(sizes), "ranks": rows},
           arguments.json)  # fmt: skip
    print("| rank | DyLoRA, truncated | LoRA | difference in pooled standard errors |\n|---|---|---|---|")
    for rank, told in rows.items():
        print(f"| {rank} | {told['dylora']:.4f} | {told['lora']:.4f} | {told['errors']:+.1f} |")
    behind = [rank for rank, told in rows.items() if told["errors"] < -ERRORS]
    if behind:
        print(f"behind by more than {ERRORS:g} pooled standard errors: ranks {behind}", file=sys.stderr)


def reviews(sizes: Sizes, seed: int) -> Dataset:
    """The reviews to train on, drawn by the seed, and those to test on, which no seed changes."""
    data = Data(source="reviews", template="{text}", train_examples=sizes.train, test_examples=sizes.test, seed=seed)
    return open_data(data)


def trained(method: Method, sizes: Sizes, seed: int) -> tuple[Any, Any, Dataset]:
    """A model with its trained adapter, its tokenizer and the data."""
    data = reviews(sizes, seed)
    model, tokenizer = models.load(BASE, labels=len(data.labels), seed=seed)
    torch.manual_seed(seed)
    lk.attach(model, with_head(model, method), NAME)
    feed = Feed(encode_texts(data.train, tokenizer, 480), tokenizer.pad_token_id, collate, order)
    for _ in run(model, feed, Train(epochs=sizes.epochs, learning_rate=RATE, seed=seed), name=NAME):
        pass
    return model, tokenizer, data


def dylora(sizes: Sizes, seed: int) -> dict[int, float]:
    """The accuracy of one training at each rank."""
    model, tokenizer, data = trained(lk.DyLoRA(rank=max(RANKS)), sizes, seed)
    found = {}
    for rank in RANKS:
        lk.DyLoRA.truncate(model, NAME, rank, f"{NAME}-{rank}")
        with lk.use(model, f"{NAME}-{rank}"):
            found[rank] = classification_accuracy(model, tokenizer, data.test)
    return found


def lora(sizes: Sizes, seed: int) -> dict[int, float]:
    """The accuracy of a training for each rank; the scale is DyLoRA's at that rank."""
    found = {}
    for rank in RANKS:
        model, tokenizer, data = trained(replace(lk.LoRA(), rank=rank), sizes, seed)
        found[rank] = classification_accuracy(model, tokenizer, data.test)
    return found


def compared(one: list[float], other: list[float]) -> dict[str, Any]:
    """Means, and their difference in pooled standard errors."""
    pooled = ((stdev(one) ** 2 + stdev(other) ** 2) / len(one)) ** 0.5
    difference = mean(one) - mean(other)
    errors = difference / pooled if pooled else 0.0
    return {"dylora": mean(one), "lora": mean(other), "errors": errors, "accuracies": {"dylora": one, "lora": other}}


if __name__ == "__main__":
    main()
