"""Training examples that a run holds out, to see during training how it fares on texts that it does not learn."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.data import Example
from lorakit.data.opening import FEW_GROUPS, MANY_ROWS
from lorakit.data.split import fingerprint, split
from lorakit.errors import BadData


def hold_out(examples: Sequence[Example], count: int) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and about `count` to evaluate on; no context stands on both sides.

    Where a few contexts are prompts that all examples share, no target does.

    Raises:
        BadData: more than half of the examples would be held out, or all of them belong together.

    >>> train, held = hold_out([Example(f"film {n % 4}", " good") for n in range(12)], count=3)
    >>> len(train), len(held), {example.context for example in train} & {example.context for example in held}
    (9, 3, set())
    """
    if 2 * count > len(examples):
        raise BadData(f"evaluate.held_out={count} is more than half of the {len(examples)} training examples; hold "
                      "out fewer, or leave train.evaluate_every at 0")  # fmt: skip
    contexts = len({fingerprint(example.context) for example in examples})
    labelled = all(example.label is not None for example in examples)
    are_prompts = not labelled and contexts <= FEW_GROUPS and len(examples) >= MANY_ROWS * contexts
    train, held = split(examples, count / len(examples), lambda e: fingerprint(e.target if are_prompts else e.context))
    if not held:
        raise BadData("all training examples have one context, so none can be held out to evaluate on during training; "
                      "give others, or leave train.evaluate_every at 0")  # fmt: skip
    return train, held
