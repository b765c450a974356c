"""A training step of SmolLM2-135M: ours beside PEFT in a plain loop, Trainer, TRL's SFTTrainer and full fine-tuning.

Every library takes the same batches of examples, in turn, from the same A and B. The loss of the first step and the
adapter's gradients are compared before anything is timed; peak memory is that of a fresh process. Scenarios: (a) equal
lengths, all labelled; (b) ragged lengths, half labelled; (c) E2E, contexts shared; (d) reviews, the label learned.

Where there is a CUDA device all of it runs there, in bfloat16, and peak memory is what PyTorch has allocated. To these
come (8b), rows of 128 to 1024 tokens, half labelled, through random weights of the shape of Llama 3.1 8B, and
(8b-blocks), the same with each block computed again in backward; saved bytes are then those outside of blocks. A peer
that does not fit into the device's memory is named under `out_of_memory`, and has no numbers.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import _cuda
import _measure
import torch
from _measure import SavedBytes, cosine, foreign_seconds, gradients, matrix_rate, needed_flops
from _peers import BASE, Base, Library, Task, libraries
from _record import options, record
from _scenarios import ON_CUDA, PEERS, SCENARIOS, TARGETS, Examples, Scenario
from torch import Tensor

import lorakit as lk
from lorakit import models
from lorakit.data import Encoded, collate, order
from lorakit.train import Feed, Train

RANK, QUICK_ROWS = 8, 4
AGREE = {  # the first step's loss: at most so far off, and of merged weights, which are rounded; cosine of gradients
    torch.float32: (1e-5, 1e-5, 0.999),
    torch.bfloat16: (2e-2, 5e-2, 0.99),
}
FASTER = {"a-qv": 1.0, "a-all": 1.08, "b": 1.9, "c": 2.7, "d": 2.0}  # at least so many times as fast as PEFT's loop
SAVED = {"a": 0.70, "c": 0.4}  # at most this share of the bytes that PEFT saves for backward


@dataclass(frozen=True)
class Place:
    """Where the models are, in what dtype, and what measures there."""

    name: str
    device: str
    dtype: torch.dtype
    meters: Any  # the module with `interleaved` and `peak_bytes`


def place() -> Place:
    """A CUDA device if there is one."""
    if torch.cuda.is_available():
        return Place(torch.cuda.get_device_name(0), "cuda", torch.bfloat16, _cuda)
    return Place("cpu", "cpu", torch.float32, _measure)


def main() -> None:
    """Compare, measure, print, write, and fail where a bar is missed."""
    here = place()
    on_cuda = here.meters is _cuda
    known = SCENARIOS | ON_CUDA if on_cuda else SCENARIOS
    arguments = parsed(known)
    tokenizer, found = models.load(BASE)[1], {}
    for name in arguments.scenario:
        scenario = known[name]
        batches = frozen(scenario, tokenizer, arguments)
        for targets in filter(scenario.targets.__contains__, arguments.targets):
            task = tasked(scenario, batches, targets, here, steps=len(batches) * (1 + arguments.rounds))
            peers = filter(scenario.peers.__contains__, arguments.peers)
            found[case := f"{name}-{targets}"] = measured(task, ("ours", *peers), arguments.rounds, here.meters)
            print(f"## {case}\n{table(found[case])}\n", flush=True)
    told = {name: getattr(arguments, name) for name in ("quick", "order", "batches", "rounds")}
    told |= {"device": here.name, "dtype": str(here.dtype).removeprefix("torch.")}
    e2e = "synthetic" if arguments.e2e is None else arguments.e2e.name
    record("train_step", {**told, "e2e": e2e, "threads": torch.get_num_threads(), **found}, arguments.json)
    barred = {} if arguments.quick or on_cuda else found
    if missed := [text for case, result in barred.items() for text in faults(case, result)]:
        sys.exit("; ".join(missed))


def parsed(known: Mapping[str, Scenario]) -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="few examples: shows that it runs, nothing else")
    parser.add_argument("--scenario", nargs="+", choices=known, default=list(known))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--batches", type=int, default=3, help="different batches of a scenario")
    parser.add_argument("--rounds", type=int, default=3, help="how often each library takes each batch")
    parser.add_argument("--order", choices=ORDERS, default="shuffled", help="which examples come together")
    parser.add_argument("--e2e", type=Path, metavar="PATH", help="the E2E set, or its folder; else one of its shape")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batches = arguments.rounds = 1
    return arguments


def shuffled(lengths: Sequence[int], *rest: Any) -> list[list[int]]:
    """lorakit's order without its sorting by length: what a random sampler draws, but for contexts kept together."""
    return order([1] * len(lengths), *rest)


ORDERS = {"lorakit": order, "shuffled": shuffled}


def frozen(scenario: Scenario, tokenizer: Any, arguments: argparse.Namespace) -> tuple[tuple[Encoded, ...], ...]:
    """The first full batches of an epoch."""
    examples, rows = scenario.examples(tokenizer, arguments.e2e), QUICK_ROWS if arguments.quick else scenario.rows
    feed = Feed(examples, 0, collate, ORDERS[arguments.order])
    full = (numbers for [numbers] in feed.plan(Train(batch_size=rows), 0) if len(numbers) == rows)
    return tuple(tuple(examples[number] for number in numbers) for numbers in islice(full, arguments.batches))


def tasked(scenario: Scenario, batches: Sequence[Examples], targets: str, here: Place, *, steps: int) -> Task:
    """What every library is given."""
    method = lk.LoRA(rank=RANK, alpha=2 * RANK, targets=TARGETS[targets])
    return Task(batches, method, steps, Base(here.dtype, here.device, scenario.shape), scenario.checkpointing)


def measured(task: Task, names: Sequence[str], rounds: int, meters: Any) -> dict[str, Any]:
    """Everything about one task: agreement first, then time, then memory."""
    with libraries(names, task) as found:
        saved = compared(found, task)
        model, adapter = found["ours"].model, sum(tensor.numel() for tensor in found["ours"].adapter.values())
        rate = matrix_rate(model, max(tokens_of(batch) for batch in task.batches))
        flops = [needed_flops(model, batch, adapter) for batch in task.batches]
        steps = {name: library.steps for name, library in found.items()}
        began, others = time.perf_counter(), foreign_seconds()
        spent = meters.interleaved(steps, len(task.batches), rounds)
        others = (foreign_seconds() - others) / (time.perf_counter() - began)
    del found, model, steps
    gc.collect()
    seconds = {name: mean(map(median, batches)) for name, batches in spent.items()}
    needed = {name: mean(flop["full" if name == "full" else "lora"] for flop in flops) for name in seconds}
    real = mean(map(tokens_of, task.batches))
    labelled = mean(sum(len(e.ids) - e.start for e in batch) for batch in task.batches)
    return {
        **seconds,
        **ratios(seconds, spent),
        "tokens": {"real": real, "labelled": labelled, "padded": mean(map(padded_of, task.batches))},
        "tokens_per_second": {name: real / seconds[name] for name in seconds},
        "labelled_per_second": {name: labelled / seconds[name] for name in seconds},
        "peak_bytes": {name: meters.peak_bytes(one_epoch, name, task) for name in seconds},
        "saved_bytes": saved,
        "share_of_roof": {name: needed[name] / rate / seconds[name] for name in seconds},
        "matrix_flops_per_second": rate,
        "cores_used_by_others": others,
        "out_of_memory": [name for name in names if name not in seconds],
    }


def tokens_of(batch: Examples) -> int:
    """Of its examples, padding not counted."""
    return sum(len(example.ids) for example in batch)


def padded_of(batch: Examples) -> int:
    """Places of its rows, padding counted."""
    return len(batch) * max(len(example.ids) for example in batch)


def compared(found: dict[str, Library], task: Task) -> dict[str, float]:
    """Take each batch once and compare the first: loss of all, gradients of all adapters; gives mean saved bytes.

    A peer that runs out of the device's memory leaves `found`.
    """
    first, full = {}, []
    for name, library in found.items():
        try:
            first[name] = watched(library, len(task.batches))
        except torch.OutOfMemoryError:
            full.append(name)
    for name in full:
        print(f"{name} does not fit into memory", flush=True)
        del found[name]
        _cuda.clean()
    adapted, rounded, least = AGREE[task.base.dtype]
    ours, *_, grads = first["ours"]
    for name in list(found)[1:]:
        loss, _, theirs = first[name]
        off, most, along = abs(loss / ours - 1), rounded, 1.0
        if found[name].adapter:
            most, along = adapted, cosine(grads, theirs)
        if not (off <= most and along > least):
            sys.exit(f"the first step differs from that of {name}: loss by {off:.1e} (at most {most:.0e}), "
                     f"cosine of the gradients {along:.6f} (above {least})")  # fmt: skip
    told = ", ".join(f"{name} {loss:.6f}" for name, (loss, *_) in first.items())
    print(f"{told} is the loss of the first step", flush=True)
    return {name: saved for name, (_, saved, _) in first.items()}


def watched(library: Library, batches: int) -> tuple[float, float, dict[str, Tensor]]:
    """Take so many steps: the first one's loss, the mean of the bytes they saved, and the first one's gradients."""
    ledgers = [SavedBytes(library.model) for _ in range(batches)]
    with gradients(library.adapter) as found, ledgers[0].counted():
        loss = next(library.steps)
    for ledger in ledgers[1:]:
        with ledger.counted():
            next(library.steps)
    return loss, mean(ledger.most for ledger in ledgers), found


def ratios(seconds: Mapping[str, float], spent: Mapping[str, list[list[float]]]) -> dict[str, Any]:
    """How many times longer each peer's step takes than ours, and the least and the most in one round."""
    told: dict[str, Any] = {}
    ours = list(chain(*spent["ours"]))
    for name in list(spent)[1:]:
        single = [theirs / mine for theirs, mine in zip(chain(*spent[name]), ours, strict=True)]
        told |= {f"ratio_to_{name}": seconds[name] / seconds["ours"], f"range_to_{name}": [min(single), max(single)]}
    return told


def one_epoch(name: str, task: Task) -> Iterator[None]:
    """Get ready, then take each batch once."""
    with libraries([name], task) as found:
        with torch.no_grad():  # weights come from the disk where they are first used
            found[name].model(input_ids=torch.tensor([task.batches[0][0].ids], device=task.base.device))
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
