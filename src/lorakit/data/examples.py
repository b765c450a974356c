"""What every data set becomes: contexts and the targets that should follow them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """A text and what should follow it.

    Example:
        >>> Example("Review: a fine film\\nSentiment:", " positive", label=1).target
        ' positive'
    """

    context: str
    target: str
    label: int | None = None  # for classification: the number of the label


@dataclass(frozen=True, slots=True)
class Dataset:
    """Examples to train on and examples to test on; no text stands in both."""

    name: str
    train: list[Example]
    test: list[Example]
    labels: tuple[str, ...] = ()  # label words in the order of their numbers; a target is " " + its word
    notes: tuple[str, ...] = ()  # what a user should know about how the rows were read; also logged
