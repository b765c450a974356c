"""A run up to its first step: what would be trained, and what the model would read first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lorakit.core.summary import Summary, summary
from lorakit.data import Dataset, Encoded
from lorakit.reproduce.place import refuse_place
from lorakit.reproduce.run import Ready, Run, forecast, prepare, ready
from lorakit.train.track import require


class Shown(NamedTuple):
    """An example as the model reads it: what is only read, and what is learned."""

    read: str
    learned: str
    tokens: int
    labelled: int


@dataclass(frozen=True)
class Rehearsal:
    """A run that did not begin; nothing of it was written."""

    summary: Summary
    plan: list[tuple[str, object]]
    batch: list[Shown]
    forecast: str = ""  # memory and time on this machine


def rehearse(run_: Run, *, resume: bool = False) -> Rehearsal:
    """Load base and data, attach the adapter, and tell what the run would do.

    Args:
        run_: the declaration.
        resume: the run is to go on in `out`, so that it may be there.

    Raises:
        LorakitError: anything in the declaration that cannot be done.
    """
    require(run_.track)
    refuse_place(run_.out, resume=resume)
    model, tokenizer, data = prepare(run_)
    made = ready(model, tokenizer, data, run_)
    told = summary(model)
    fresh = tuple(replace(adapter, resting=()) for adapter in told.adapters)  # none has had an occasion to act
    rows, batch = _plan(made, data, run_), first_batch(made, data, run_)
    return Rehearsal(replace(told, adapters=fresh), rows, batch, str(forecast(made, run_)))


def first_batch(made: Ready, data: Dataset, run_: Run) -> list[Shown]:
    """The examples of the first batch, decoded."""
    numbers = next(made.examples.plan(run_.train, 0))[0]
    return [_shown(made.examples.examples[number], made.tokenizer, data.labels) for number in numbers]


def _shown(example: Encoded, tokenizer: Any, labels: tuple[str, ...]) -> Shown:
    """Decoded whole and then divided, since some tokenizers drop a space where a text begins."""
    whole, read = (tokenizer.decode(ids) for ids in (example.ids, example.ids[: example.start]))
    if example.start == len(example.ids) and example.label is not None:  # a classifier's label, which no token writes
        learned = labels[example.label]
    else:
        learned = whole[len(read) :] if whole.startswith(read) else tokenizer.decode(example.ids[example.start :])
    return Shown(read, learned, len(example.ids), _labelled(example))


def _labelled(example: Encoded) -> int:
    """How many tokens, or labels, are learned."""
    return len(example.ids) - example.start or 1


def _plan(made: Ready, data: Dataset, run_: Run) -> list[tuple[str, object]]:
    examples, settings = made.examples.examples, run_.train
    steps, batches = made.examples.steps(settings), len(made.examples.epoch(0, settings))
    return [
        ("method", run_.method.name),
        ("examples to train on", len(examples)),
        ("examples held out to evaluate on", len(made.held_out)),
        ("examples to test on", len(data.test)),
        ("tokens of the training examples", sum(len(example.ids) for example in examples)),
        ("tokens or labels to learn", sum(_labelled(example) for example in examples)),
        ("steps", steps),
        ("epochs", steps * settings.accumulate / batches),
        ("batches in a step", settings.accumulate),
        ("examples in a batch", settings.batch_size),
        ("steps between evaluations", settings.evaluate_every),
        ("steps between checkpoints", settings.checkpoint_every),
        ("learning rate", f"{settings.learning_rate:g}"),
    ]
