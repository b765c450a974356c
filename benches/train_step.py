"""A training step of SmolLM2-135M: ours beside PEFT in a plain loop, Trainer, TRL's SFTTrainer and full fine-tuning.

Every library takes the same batches of examples, in turn, from the same A and B. The loss of the first step and the
adapter's gradients are compared before anything is timed; peak memory is that of a fresh process. Scenarios: (a) equal
lengths, all labelled; (b) ragged lengths, half labelled; (c) E2E, contexts shared; (d) reviews, the label learned.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from _measure import SavedBytes, cosine, foreign_seconds, gradients, interleaved, matrix_rate, needed_flops, peak_bytes
from _peers import BASE, Library, Task, libraries
from _record import options, record

import lorakit as lk
from lorakit import models
from lorakit.data import Data, Encoded, collate, encode, open_data, order
from lorakit.train import Feed, Train

NAMES = ("ours", "peft", "trainer", "trl", "full")
TARGETS = {"qv": ("attn.q", "attn.v"), "all": ("linear",)}
RANK, ROWS, QUICK_ROWS = 8, {"a": 8, "b": 16, "c": 16, "d": 16}, 4
TOLERANCE, LEAST_COSINE = 1e-5, 0.999  # of the first step's loss, and of the adapter's gradients
FASTER = {"a-qv": 1.0, "a-all": 1.08, "b": 1.9, "c": 2.7, "d": 2.0}  # at least so many times as fast as PEFT's loop
SAVED = {"a": 0.70, "c": 0.4}  # at most this share of the bytes that PEFT saves for backward
DEVELOPMENT = "devset.csv"  # of E2E, where a folder is given
Examples = Sequence[Encoded]


def main() -> None:
    """Compare, measure, print, write, and fail where a bar is missed."""
    arguments = parsed()
    tokenizer, found = models.load(BASE)[1], {}
    for scenario in arguments.scenario:
        batches = frozen(SCENARIOS[scenario](tokenizer, arguments.e2e), scenario, arguments)
        for targets in arguments.targets:
            case = f"{scenario}-{targets}"
            method = lk.LoRA(rank=RANK, alpha=2 * RANK, targets=TARGETS[targets])
            task = Task(batches, method, steps=len(batches) * (1 + arguments.rounds))
            found[case] = measured(task, ("ours", *arguments.peers), arguments.rounds)
            print(f"## {case}\n{table(found[case])}\n", flush=True)
    told = {name: getattr(arguments, name) for name in ("quick", "order", "batches", "rounds")}
    e2e = "synthetic" if arguments.e2e is None else arguments.e2e.name
    record("train_step", {**told, "e2e": e2e, "threads": torch.get_num_threads(), **found}, arguments.json)
    if not arguments.quick and (missed := [text for case, result in found.items() for text in faults(case, result)]):
        sys.exit("; ".join(missed))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="few examples: shows that it runs, nothing else")
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--peers", nargs="*", choices=NAMES[1:], default=NAMES[1:])
    parser.add_argument("--batches", type=int, default=3, help="different batches of a scenario")
    parser.add_argument("--rounds", type=int, default=3, help="how often each library takes each batch")
    parser.add_argument("--order", choices=ORDERS, default="shuffled", help="which examples come together")
    parser.add_argument("--e2e", type=Path, metavar="PATH", help="the E2E set, or its folder; else one of its shape")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batches = arguments.rounds = 1
    return arguments


def equal(tokenizer: Any, e2e: Path | None) -> Examples:
    """64 random tokens each, all of them learned but the first."""
    chance = random.Random(0)
    return [Encoded(tokens(chance, 64), 1) for _ in range(400)]


def ragged(tokenizer: Any, e2e: Path | None) -> Examples:
    """25 to 176 random tokens, of which the second half is learned; a random batch is half padding."""
    chance = random.Random(0)
    lengths = [between(chance.lognormvariate(4.3, 0.45), 25, 176) for _ in range(800)]
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


def shuffled(lengths: Sequence[int], *rest: Any) -> list[list[int]]:
    """lorakit's order without its sorting by length: what a random sampler draws, but for contexts kept together."""
    return order([1] * len(lengths), *rest)


SCENARIOS: dict[str, Callable[[Any, Path | None], Examples]] = {
    "a": equal,
    "b": ragged,
    "c": described,
    "d": reviews,
}
ORDERS = {"lorakit": order, "shuffled": shuffled}


def frozen(examples: Examples, scenario: str, arguments: argparse.Namespace) -> tuple[tuple[Encoded, ...], ...]:
    """The first full batches of an epoch."""
    rows = QUICK_ROWS if arguments.quick else ROWS[scenario]
    feed = Feed(examples, 0, collate, ORDERS[arguments.order])
    full = (numbers for [numbers] in feed.plan(Train(batch_size=rows), 0) if len(numbers) == rows)
    return tuple(tuple(examples[number] for number in numbers) for numbers in islice(full, arguments.batches))


def measured(task: Task, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Everything about one task: agreement first, then time, then memory."""
    with libraries(names, task) as found:
        saved = compared(found, task)
        model, adapter = found["ours"].model, sum(tensor.numel() for tensor in found["ours"].adapter.values())
        rate = matrix_rate(model, max(tokens_of(batch) for batch in task.batches))
        flops = [needed_flops(model, batch, adapter) for batch in task.batches]
        steps = {name: library.steps for name, library in found.items()}
        began, others = time.perf_counter(), foreign_seconds()
        spent = interleaved(steps, len(task.batches), rounds)
        others = (foreign_seconds() - others) / (time.perf_counter() - began)
    del found, model, steps
    gc.collect()
    seconds = {name: mean(map(median, batches)) for name, batches in spent.items()}
    needed = {name: mean(flop["full" if name == "full" else "lora"] for flop in flops) for name in names}
    real = mean(map(tokens_of, task.batches))
    labelled = mean(sum(len(e.ids) - e.start for e in batch) for batch in task.batches)
    return {
        **seconds,
        **ratios(seconds, spent),
        "tokens": {"real": real, "labelled": labelled, "padded": mean(map(padded_of, task.batches))},
        "tokens_per_second": {name: real / seconds[name] for name in names},
        "labelled_per_second": {name: labelled / seconds[name] for name in names},
        "peak_bytes": {name: peak_bytes(one_epoch, name, task) for name in names},
        "saved_bytes": saved,
        "share_of_roof": {name: needed[name] / rate / seconds[name] for name in names},
        "matrix_flops_per_second": rate,
        "cores_used_by_others": others,
    }


def tokens_of(batch: Examples) -> int:
    """Of its examples, padding not counted."""
    return sum(len(example.ids) for example in batch)


def padded_of(batch: Examples) -> int:
    """Places of its rows, padding counted."""
    return len(batch) * max(len(example.ids) for example in batch)


def compared(found: Mapping[str, Library], task: Task) -> dict[str, float]:
    """Take each batch once and compare the first: loss of all, gradients of all adapters; gives mean saved bytes."""
    saved: dict[str, float] = {}
    losses, grads = {}, {}
    for name, library in found.items():
        ledgers = [SavedBytes(library.model) for _ in task.batches]
        with gradients(library.adapter) as grads[name], ledgers[0].counted():
            losses[name] = next(library.steps)
        for ledger in ledgers[1:]:
            with ledger.counted():
                next(library.steps)
        saved[name] = mean(ledger.most for ledger in ledgers)
    for name in list(found)[1:]:
        off = abs(losses[name] / losses["ours"] - 1)
        along = cosine(grads["ours"], grads[name]) if found[name].adapter else 1.0
        if not (off <= TOLERANCE and along > LEAST_COSINE):
            sys.exit(f"the first step differs from that of {name}: loss by {off:.1e} (at most {TOLERANCE:.0e}), "
                     f"cosine of the gradients {along:.6f} (above {LEAST_COSINE})")  # fmt: skip
    print(", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()), "is the loss of the first step", flush=True)
    return saved


def ratios(seconds: Mapping[str, float], spent: Mapping[str, list[list[float]]]) -> dict[str, Any]:
    """How many times longer each peer's step takes than ours, and the least and the most in one round."""
    told: dict[str, Any] = {}
    ours = list(chain(*spent["ours"]))
    for name in list(spent)[1:]:
        single = [theirs / mine for theirs, mine in zip(chain(*spent[name]), ours, strict=True)]
        told |= {f"ratio_to_{name}": seconds[name] / seconds["ours"], f"range_to_{name}": [min(single), max(single)]}
    return told


def one_epoch(name: str, task: Task) -> Iterator[None]:
    """In a process of its own: get ready, then take each batch once."""
    with libraries([name], task) as found:
        with torch.no_grad():  # weights come from the disk where they are first used
            found[name].model(input_ids=torch.tensor([task.batches[0][0].ids]))
        yield
        for _ in task.batches:
            next(found[name].steps)
            yield


def faults(case: str, result: Mapping[str, Any]) -> Iterator[str]:
    """Bars that are missed, against PEFT in a plain loop."""
    if "peft" not in result:
        return
    faster, saved = FASTER.get(case, FASTER.get(case[0])), SAVED.get(case[0], 1.0)
    if result["ratio_to_peft"] < faster:
        yield f"{case}: a step is {result['ratio_to_peft']:.2f} times as fast as PEFT's, not {faster}"
    share = result["saved_bytes"]["ours"] / result["saved_bytes"]["peft"]
    if share > saved:
        yield f"{case}: backward keeps {share:.2f} of the bytes that PEFT keeps, not {saved}"


def table(result: Mapping[str, Any]) -> str:
    """A row for each library."""
    units = ["s a step", "tokens/s", "labelled/s", "peak MB", "saved MB", "of the roof", "ours is faster"]
    lines = ["| | " + " | ".join(units) + " |", "|---" * (len(units) + 1) + "|"]
    for name in result["tokens_per_second"]:
        cells = [
            name,
            f"{result[name]:.3f}",
            *(f"{result[column][name]:,.0f}" for column in ("tokens_per_second", "labelled_per_second")),
            *(f"{result[column][name] / 1e6:,.0f}" for column in ("peak_bytes", "saved_bytes")),
            f"{result['share_of_roof'][name]:.0%}",
            "" if name == "ours" else f"{result[f'ratio_to_{name}']:.2f} ×",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Other processes used {result['cores_used_by_others']:.2f} cores meanwhile."])


if __name__ == "__main__":
    main()
