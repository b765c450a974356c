"""Every method on the same task through the same run: accuracy, trained parameters, time, memory and latency.

MiniLM (22 M parameters) with a fresh classification head learns to tell good film reviews from bad ones; the head is
trained with every method. First each method is trained and measured on held-out reviews; then one training step and one
forward pass of each are timed in turn, many times over, as ratios to LoRA's step and to the bare model's pass.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from _record import options, record

import lorakit as lk
from lorakit import models
from lorakit.core.method import Method, method_names
from lorakit.core.stepping import after_step, before_step, penalty
from lorakit.data import Data, Dataset, collate, encode_texts, open_data, order
from lorakit.errors import NotMergeable
from lorakit.evaluate import classification_accuracy
from lorakit.reproduce.run import with_head
from lorakit.train import Feed, Train, run
from lorakit.train.loss import loss_for

BASE, NAME = "minilm-l6", "reviews"
RATE, ABOVE_MAJORITY = 2e-3, 0.05
RATES = {  # learning rates other than RATE
    **dict.fromkeys(("adalora", "lokr", "prefix-layer", "ia3"), 1e-2),
    **{"full": 1e-4, "full-top2": 3e-4, "bitfit": 5e-3, "vera": 2e-2},
}
TIMED = dict(batch=16, tokens=64)


@dataclass(frozen=True)
class Sizes:
    """How much of everything; None: all test reviews."""

    seeds: tuple[int, ...]
    train: int
    epochs: float
    test: int | None
    rounds: int


FULL = Sizes(seeds=(0,), train=1600, epochs=1, test=None, rounds=20)
QUICK = Sizes(seeds=(0,), train=64, epochs=1, test=40, rounds=2)


def main() -> None:
    """Train, measure, time, print a table, write, and fail where a method did not learn."""
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="few examples: shows that it runs, nothing else")
    parser.add_argument("--only", nargs="*", metavar="METHOD", help="these methods alone")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table of the docs there")
    parser.add_argument("--accuracies", type=Path, metavar="FILE", help="keep accuracies there; find what it lacks")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    methods = chosen(arguments.only)
    found = {name: all_learned(name, method, sizes, arguments.accuracies) for name, method in methods.items()}
    for name, costs in timed(methods, sizes.rounds).items():
        found[name] |= costs
    majority = share_of_majority(reviews(sizes, 0))
    record("methods", result(found, majority, sizes), arguments.json)
    table = markdown(found)
    print(table)
    if arguments.markdown:
        arguments.markdown.write_text(table + "\n", encoding="utf-8")
    slow = [name for name, told in found.items() if told["accuracy"] < majority + ABOVE_MAJORITY]
    if slow and not arguments.quick:
        sys.exit(f"{', '.join(slow)} did not end {ABOVE_MAJORITY:.0%} above the majority's {majority:.3f}")


def chosen(only: list[str] | None) -> dict[str, Method]:
    """Every name that a method goes by, with the method it stands for."""
    kinds = {name: kind.of_fields(dict(preset)) for name, (kind, preset) in method_names().items()}
    first = {"lora": kinds["lora"]}
    del kinds["bottleneck"]  # its defaults are houlsby's
    return {name: method for name, method in (first | kinds).items() if not only or name in {*only, "lora"}}


def reviews(sizes: Sizes, seed: int) -> Dataset:
    """The reviews to train on, drawn by the seed, and those to test on, which no seed changes."""
    data = Data(source="reviews", template="{text}", train_examples=sizes.train, test_examples=sizes.test, seed=seed)
    return open_data(data)


def share_of_majority(data: Dataset) -> float:
    """The accuracy of always giving the commoner label."""
    return max(Counter(example.label for example in data.test).values()) / len(data.test)


def all_learned(name: str, method: Method, sizes: Sizes, file: Path | None) -> dict[str, Any]:
    """What `learned` finds, kept in a file so that a bench that was stopped goes on from there."""
    kept = json.loads(file.read_text()) if file is not None and file.exists() else {}
    if name not in kept:
        kept[name] = learned(name, method, sizes)
        if file is not None:
            file.write_text(json.dumps(kept, indent=2) + "\n")
    return dict(kept[name])


def learned(name: str, method: Method, sizes: Sizes) -> dict[str, Any]:
    """Held-out accuracy after training, for each seed."""
    accuracies = [accuracy_of(name, method, sizes, seed) for seed in sizes.seeds]
    print(f"{name}: {', '.join(f'{accuracy:.4f}' for accuracy in accuracies)}", flush=True)
    return {"accuracy": mean(accuracies), "accuracies": accuracies}


def accuracy_of(name: str, method: Method, sizes: Sizes, seed: int) -> float:
    """One training from the base, and its accuracy."""
    data = reviews(sizes, seed)
    model, tokenizer, feed = prepared(data, seed)
    torch.manual_seed(seed)
    lk.attach(model, with_head(model, method), NAME)
    settings = Train(epochs=sizes.epochs, learning_rate=RATES.get(name, RATE), seed=seed)
    for _ in run(model, feed, settings, name=NAME):
        pass
    return classification_accuracy(model, tokenizer, data.test)


def prepared(data: Dataset, seed: int) -> tuple[Any, Any, Feed]:
    """A fresh model with its head, and the training reviews as batches."""
    model, tokenizer = models.load(BASE, labels=len(data.labels), seed=seed)
    return model, tokenizer, Feed(encode_texts(data.train, tokenizer, 480), tokenizer.pad_token_id, collate, order)


def timed(methods: dict[str, Method], rounds: int) -> dict[str, dict[str, Any]]:
    """Costs of each method, on a model of its own."""
    untouched, _ = models.load(BASE, labels=2)
    feed = _random_feed(untouched)
    own = {name: attached(name, method) for name, method in methods.items()}
    steps: dict[str, list[float]] = {name: [] for name in methods}
    passes: dict[str, list[float]] = {name: [] for name in methods}
    bare: list[float] = []
    for _ in range(rounds + 1):  # the first round warms up
        for name, model in own.items():
            steps[name].append(step_seconds(model, feed, name))
        for name, model in own.items():
            passes[name].append(pass_seconds(model))
        bare.append(pass_seconds(untouched))
    told = {name: lk.summary(model).adapters[0] for name, model in own.items()}
    held = {name: memory(model, feed, name) for name, model in own.items()}
    return {
        name: {
            "trained": told[name].trainable,
            "file_bytes": told[name].bytes_on_disk,
            "step_seconds": median(steps[name][1:]),
            "step_bytes": held[name],
            "pass_seconds": median(passes[name][1:]),
            "step_ratio": median(steps[name][1:]) / median(steps["lora"][1:]),
            "pass_ratio": median(passes[name][1:]) / median(bare[1:]),
            "memory_ratio": held[name] / held["lora"],
            "inserted": sum(method.inserts),
            "merges": merges(own[name], name),
            "rows": rows(own[name], name),
        }
        for name, method in methods.items()
    }


def attached(name: str, method: Method) -> Any:
    """A fresh model with its head that carries the method, in force."""
    model, _ = models.load(BASE, labels=2)
    lk.attach(model, with_head(model, method), name)
    return model


def _random_feed(model: Any) -> Feed:
    from lorakit.data.tokens import Encoded

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (TIMED["batch"], TIMED["tokens"]), generator=generator).tolist()
    examples = [Encoded(tuple(row), len(row), number % 2) for number, row in enumerate(ids)]
    return Feed(examples, model.config.pad_token_id, collate, order)


def step_seconds(model: Any, feed: Feed, name: str) -> float:
    """One optimiser step with all that the method does around it."""
    trained = lk.parameters(model, name)
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    with lk.use(model, None):
        loss = loss_for(model, feed, Train())
    (portion,) = loss.portions(feed.examples, Train().forward_tokens)
    model.train()
    with lk.use(model, name):
        began = time.perf_counter()
        before_step(model, name, 1, 1000)
        loss.backward(model, portion, portion.labelled)
        added = penalty(model, name)
        if added is not None:
            added.backward()
        optimizer.step()
        after_step(model, name, 1, 1000)
        spent = time.perf_counter() - began
    optimizer.zero_grad()
    return spent


@torch.no_grad()
def pass_seconds(model: Any) -> float:
    """One forward pass of a single text."""
    ids = torch.full((1, TIMED["tokens"]), 2000)
    model.eval()
    began = time.perf_counter()
    for _ in range(5):
        model(input_ids=ids)
    return (time.perf_counter() - began) / 5


def memory(model: Any, feed: Feed, name: str) -> int:
    """Bytes that a step holds: what autograd saves (the base's weights apart), gradients and AdamW's moments."""
    held: dict[int, int] = {}
    mine = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = feed.batch(range(len(feed.examples)))
    model.train()
    with lk.use(model, name), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT)
        saved = sum(held.values())
    del output
    return saved + 3 * sum(parameter.numel() * 4 for parameter in lk.parameters(model, name))


def merges(model: Any, name: str) -> bool:
    """Whether the method can be folded into the weights."""
    try:
        lk.merge(model, name)
    except NotMergeable:
        return False
    lk.unmerge(model)
    return True


def rows(model: Any, name: str) -> bool:
    """Whether rows of one batch can use the method beside others."""
    try:
        with lk.use(model, [name, None]):
            return True
    except lk.LorakitError:
        return False


def result(found: dict[str, dict[str, Any]], majority: float, sizes: Sizes) -> dict[str, Any]:
    """What is written down."""
    settings = {"base": BASE, "rate": RATE, "rates": RATES, "timed": TIMED, "sizes": asdict(sizes)}
    return {"quick": sizes == QUICK, **settings, "majority": majority, "methods": found}


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """The table of the docs."""
    costs = ["trained", "step", "memory", "latency", "positions", "merges", "mixed batch"]
    head = ["method", "learning rate", "accuracy", *costs]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, told in found.items():
        cells = [
            name,
            f"{RATES.get(name, RATE):g}",
            f"{told['accuracy']:.3f}",
            f"{told['trained']:,}",
            *(f"{told[key]:.2f} ×" for key in ("step_ratio", "memory_ratio", "pass_ratio")),
            str(told["inserted"]),
            *("yes" if told[key] else "no" for key in ("merges", "rows")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lora = found["lora"]
    step, held = f"{lora['step_seconds'] * 1e3:.0f} ms", f"{lora['step_bytes'] / 1e6:.1f} MB"
    pass_ = lora["pass_seconds"] / lora["pass_ratio"] * 1e3
    return "\n".join([*lines, "", f"1.00 × is {step} a step, {held}, and {pass_:.1f} ms a pass."])


if __name__ == "__main__":
    main()
