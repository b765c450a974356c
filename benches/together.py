"""Several LoRA adapters of SmolLM2-135M in one pass, beside runs of their own: bits, peak memory, seconds a step.

The adapters of a pass are compared with those of as many runs, bit for bit, before anything is measured. Peak memory is
that of a fresh process above the loaded model; steps of the pass and of one run are timed in turn.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from statistics import median
from typing import Any

import torch
from _measure import interleaved, peak_bytes
from _record import options, record
from torch import Tensor

import lorakit as lk
from lorakit import models
from lorakit.core.state import adapter_tensors
from lorakit.data import Encoded, collate, order
from lorakit.train import Feed, Train, run
from lorakit.train.loop import Steps
from lorakit.train.together import Part, together, view

BASE = "smollm2-135m"
TARGETS = {"qv": ("attn.q", "attn.v"), "all": ("linear",)}
ENDLESS = 10_000  # steps, more than any measurement takes
MEMORY, TIME = 1.5, 1.0  # bars: times the peak of one run, times the seconds of a run's own step
NOISE = 0.05  # of a time


def main() -> None:
    """Compare, measure, print, write, and fail where a bar is missed."""
    arguments = parsed()
    refuse_difference(arguments)
    found = {"memory": memory(arguments), "time": seconds(arguments)}
    told = {name: getattr(arguments, name) for name in ("quick", "adapters", "targets", "tokens", "rows", "rounds")}
    record("together", {**told, "threads": torch.get_num_threads(), **found}, arguments.json)
    one, many = (found["memory"][side] / 2**20 for side in ("one run", "ours"))
    print(
        f"peak memory: {many:.0f} MB with {arguments.adapters} adapters, {one:.0f} MB with one: {many / one:.2f} times"
    )
    own, ours = (1000 * found["time"][side] for side in ("own run", "ours"))
    print(f"a step of one adapter: {ours:.0f} ms in the pass, {own:.0f} ms in its own run: {ours / own:.2f} times")
    if not arguments.quick and (many > MEMORY * one or ours > (TIME + NOISE) * own):
        sys.exit(f"at most {MEMORY} times the memory of one run and {TIME} times its time are allowed")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="few tokens and steps: shows that it runs, nothing else")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each example")
    parser.add_argument("--rows", type=int, default=Train().batch_size, help="examples in a batch")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each adapter")
    parser.add_argument("--targets", choices=TARGETS, default="all")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.rows, arguments.rounds = 8, 2, 1
    return arguments


def attached(base: Any, names: Iterable[str], targets: str) -> Any:
    """The base with these adapters; each starts from a seed of its own."""
    model = view(base)
    for name in names:
        torch.manual_seed(int(name))
        lk.attach(model, lk.LoRA(rank=8, targets=TARGETS[targets]), name)
    return model


def parts(arguments: argparse.Namespace, count: int, steps: int) -> dict[str, Part]:
    """Runs on the same examples, all of one length, that differ in seed and learning rate."""
    chance = random.Random(0)
    ids = [tuple(chance.choices(range(100, 40000), k=arguments.tokens)) for _ in range(64)]
    feed = Feed([Encoded(each, 1) for each in ids], 0, collate, order)
    told = [Train(steps=steps, batch_size=arguments.rows, seed=n, learning_rate=1e-3 / (n + 1)) for n in range(count)]
    return {str(settings.seed): Part(feed, settings) for settings in told}


def own_run(base: Any, name: str, part: Part, targets: str) -> tuple[Any, Steps]:
    """A model with this adapter alone, and its run."""
    model = attached(base, [name], targets)
    return model, run(model, part.feed, part.settings, name=name)


def refuse_difference(arguments: argparse.Namespace) -> None:
    """End where an adapter of the pass has not the bits of its own run."""
    base, declared = models.load(BASE)[0], parts(arguments, arguments.adapters, steps=2)
    model = attached(base, declared, arguments.targets)
    for _ in together(model, declared):
        pass
    for name, part in declared.items():
        alone, steps = own_run(base, name, part, arguments.targets)
        before = values(alone, name)
        for _ in steps:
            pass
        if torch.equal(values(alone, name), before) or not torch.equal(values(alone, name), values(model, name)):
            sys.exit(f"adapter {name} has not the bits of its own run")
    print(f"{len(declared)} adapters have the bits of their own runs", flush=True)


def values(model: Any, name: str) -> Tensor:
    """All numbers of an adapter."""
    return torch.cat([tensor.detach().flatten() for tensor in adapter_tensors(model, name).values()])


def memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Peak bytes above the loaded model."""
    one, many = (peak_bytes(steps_of, arguments, count) for count in (1, arguments.adapters))
    return {"ours": many, "one run": one, "ratio_to_one_run": one / many}


def steps_of(arguments: argparse.Namespace, count: int) -> Iterator[Any]:
    """In a process of its own: load the model and read its weights once; then train."""
    base, declared = models.load(BASE)[0], parts(arguments, count, steps=3)
    with torch.no_grad():
        base(torch.ones(1, 2, dtype=torch.long))
    yield
    yield from together(attached(base, declared, arguments.targets), declared)


def seconds(arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step of one adapter, of the pass and of one run taken in turn; the first ones warm up."""
    base, declared = models.load(BASE)[0], parts(arguments, arguments.adapters, ENDLESS)
    pass_ = together(attached(base, declared, arguments.targets), declared)
    _, alone = own_run(base, "0", declared["0"], arguments.targets)
    for _ in islice(pass_, arguments.adapters):
        pass
    next(alone)
    spent = interleaved({"ours": pass_, "own run": alone}, 1, arguments.adapters * arguments.rounds)
    ours, own = (median(spent[name][0]) for name in ("ours", "own run"))
    return {"ours": ours, "own run": own, "ratio_to_own_run": own / ours}


if __name__ == "__main__":
    main()
