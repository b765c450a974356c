"""Open a data set: find it by its name, read its rows, hold out the test examples."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.core import registry
from lorakit.data import hub
from lorakit.data.build import FAULTS_LISTED, Draft, drafts, label_names
from lorakit.data.columns import resolved
from lorakit.data.declaration import Data, Source
from lorakit.data.examples import Dataset, Example
from lorakit.data.read import READERS, Row, rows
from lorakit.data.split import apart, fingerprint, sample, split
from lorakit.errors import BadData, UnknownName, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = "lorakit.data.tasks"
TEST_SHARE = 0.1
FEW_GROUPS, MANY_ROWS = 20, 10  # up to so many contexts, each with so many rows: the contexts are prompts, not texts

log = logging.getLogger(__name__)


def open_data(data: Data | str, tokenizer: PreTrainedTokenizerBase | None = None) -> Dataset:
    """Read a data set into examples to train on and to test on.

    Args:
        data: the declaration, or only its source.
        tokenizer: renders chat messages; needed for nothing else.

    Raises:
        UnknownName: no such data set; the message gives the nearest names.
        BadData: a file, column or row that cannot be used, with its line.

    Example:
        >>> reviews = open_data("reviews")
        >>> len(reviews.train) + len(reviews.test), reviews.labels
        (8530, ('negative', 'positive'))
        >>> print(reviews.train[0].context + reviews.train[0].target)
        Review: ...
        Sentiment: positive
    """
    source = _source(Data(source=data) if isinstance(data, str) else data)
    notes: list[str] = []
    train, test, data = _sides(source, tokenizer, notes)
    labels = _labels([*train, *test], data)
    for note in notes:
        log.warning("%s: %s", data.source, note)
    return Dataset(
        data.source,
        _taken(train, labels, data.train_examples, data.seed, f"{data.source} for training"),
        _taken(test, labels, data.test_examples, 0, f"{data.source} for testing"),
        labels,
        tuple(notes),
    )


def _source(data: Data) -> Source:
    name = data.source.replace("_", "-")
    path = Path(data.source).expanduser()
    if name in registry.names(TASKS):
        return registry.find(TASKS, name).source(replace(data, source=name))
    if path.exists() or path.suffix.lower() in READERS:
        data.refuse("path", "subset")
        return Source(data, rows(path), rows(data.test) if data.test else None)
    if data.source.count("/") == 1:
        return hub.source(data)
    raise UnknownName(
        f"there is no data set {data.source!r}: it is no file, no hub name (owner/name) and not built in; "
        + nearest(name, registry.names(TASKS))
    )


def _sides(
    source: Source, tokenizer: PreTrainedTokenizerBase | None, notes: list[str]
) -> tuple[list[Draft], list[Draft], Data]:
    """Training and test drafts with no group in common, and the declaration with its columns."""
    first, train_rows = _peek(source.train, source.data.source)
    data = resolved(source.data, first.cells, first.place) if first else source.data
    train = drafts(train_rows, data, tokenizer)
    if not (data.context or data.template or data.messages):
        notes.append("no context is named, so the targets stand alone")
    if source.test is None:
        train = _regrouped(train, data, notes)
        share = TEST_SHARE if data.test_share is None else data.test_share
        return *split(train, share, _group), data
    first, test_rows = _peek(source.test, f"the test part of {data.source}")
    if first:
        resolved(data, first.cells, first.place)
    test = drafts(test_rows, data, tokenizer)
    return _apart(train, test, data, notes), test, data


def _peek(stream: Iterable[Row], name: str) -> tuple[Row | None, Iterator[Row]]:
    """The first row that can be read, and all rows as before."""
    remaining = iter(stream)
    seen: list[Row] = []
    for row in islice(remaining, FAULTS_LISTED + 1):
        seen.append(row)
        if not row.fault:
            return row, chain(seen, remaining)
    if not seen:
        raise BadData(f"{name} is empty: it has no rows; give a data set with at least one")
    return None, chain(seen, remaining)


def _group(draft: Draft) -> bytes:
    return draft.group


def _regrouped(found: list[Draft], data: Data, notes: list[str]) -> list[Draft]:
    """Group by target where the contexts are a few prompts that all rows share."""
    groups = len({draft.group for draft in found})
    if data.group or data.label or groups > FEW_GROUPS or len(found) < MANY_ROWS * groups:
        return found
    notes.append(
        f"with only {groups} different contexts, rows are held out by their targets; name a group to change it"
    )
    return [replace(draft, group=fingerprint(draft.target)) for draft in found]


def _apart(train: list[Draft], test: list[Draft], data: Data, notes: list[str]) -> list[Draft]:
    """Take out of training what is tested."""
    both = _regrouped([*train, *test], data, notes)
    kept = apart(both[: len(train)], both[len(train) :], _group)
    if not kept:
        raise BadData(f"every training text of {data.source} stands in its test part too; give other test rows")
    if len(kept) < len(train):
        notes.append(f"{len(train) - len(kept)} of {len(train)} training rows are left out: their texts are tested")
    return kept


def _labels(found: list[Draft], data: Data) -> tuple[str, ...]:
    if not data.label or data.labels:
        return data.labels
    labels = label_names(draft.label for draft in found if draft.label is not None)
    if len(labels) < 2:
        raise BadData(f"column {data.label!r} of {data.source} holds only the label {labels[0]!r}; two are needed")
    return labels


def _taken(found: list[Draft], labels: tuple[str, ...], count: int | None, seed: int, what: str) -> list[Example]:
    if count is not None and count > len(found):
        raise BadData(f"there are {len(found)} examples of {what}, not the {count} asked for; ask for fewer")
    taken = found if count is None else sample(found, count, seed)
    return [draft.example(labels) for draft in taken]
