"""The one declaration of a data set: which rows, which columns, how many."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from lorakit.data.read import Row
from lorakit.errors import BadData


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which data to read, and which of its columns are context and target.

    Where the columns are not named, `context` and `target` (or `messages`) are looked for.

    Raises:
        BadData: values that contradict each other, all of them in one sentence.

    Example:
        >>> Data(source="pairs.csv", template="Question: {q}\\nAnswer:", target="a").seed
        0
    """

    source: str  # a built-in task, a file (.csv .jsonl .parquet .tsv) or a hub data set (owner/name)
    path: str | None = None  # the file of a built-in task that brings none
    test: str | None = None  # file (or split of a hub data set) of the test rows; None: a share of `source`
    subset: str | None = None  # configuration of a hub data set that has several
    context: str | None = None  # column of the context
    template: str | None = None  # text with {column} fields that makes the context
    target: str | None = None  # column of the target
    messages: str | None = None  # column of chat messages; the last one, the assistant's, is the target
    label: str | None = None  # column of the label, for classification
    labels: tuple[str, ...] = ()  # names of the labels in the order of their numbers
    group: str | None = None  # rows alike in this column stay together in training or test; None: the context
    train_examples: int | None = None  # how many to train on; None: all
    test_examples: int | None = None  # how many to test on; None: all
    test_share: float | None = None  # part of the texts held out when there is no `test`; None: the task's, or 0.1
    seed: int = 0  # which examples are taken when not all are; the held-out texts never depend on it

    def __post_init__(self) -> None:
        if faults := [text for text, wrong in self._faults() if wrong]:
            raise BadData(f"data set {self.source!r} cannot be read as asked: {'; '.join(faults)}")

    def _faults(self) -> Iterable[tuple[str, bool]]:
        others = (self.context, self.template, self.target, self.label)
        counts = {"train_examples": self.train_examples, "test_examples": self.test_examples}
        share = self.test_share
        return [
            ("give context or template, not both", bool(self.context and self.template)),
            ("messages hold context and target; name no other column", bool(self.messages and any(others))),
            ("labels need a label column beside the target", bool(self.labels and self.target and not self.label)),
            ("a label name stands twice in labels", len(set(self.labels)) < len(self.labels)),
            *((f"{name}={n} must be at least 1", n is not None and n < 1) for name, n in counts.items()),
            (f"test_share={share} must be at least 0 and below 1", share is not None and not 0 <= share < 1),
            ("test names the test rows, so test_share has no use", bool(self.test and share)),
        ]

    def refuse(self, *names: str) -> None:
        """Refuse values that this data set has no use for.

        Raises:
            BadData: one of these fields has a value.
        """
        if given := [name for name in names if getattr(self, name)]:
            raise BadData(f"data set {self.source!r} has no use for {' and '.join(given)}; leave it out")

    def filled(self, **usual: Any) -> Data:
        """The same declaration with `usual` values where the user gave none, and none that contradict the user's.

        >>> Data(source="x", context="text").filled(template="{body}", target="name", test_share=0.2).template is None
        True
        """
        taken: set[str] = set()
        if self.context or self.template or self.messages:
            taken |= {"context", "template", "messages"}
        if self.target or self.label or self.messages:
            taken |= {"target", "label", "labels", "messages"}
        taken |= {name for name in usual if getattr(self, name) not in (None, ())}
        return replace(self, **{name: value for name, value in usual.items() if name not in taken})


@dataclass(frozen=True, slots=True)
class Source:
    """Where the rows come from: streams of training and test rows, and the declaration that reads them."""

    data: Data
    train: Iterable[Row]
    test: Iterable[Row] | None = None  # None: a share of the training rows is held out
