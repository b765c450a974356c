"""Accuracy."""

from __future__ import annotations

from collections.abc import Sequence


def accuracy(predicted: Sequence[object], wanted: Sequence[object]) -> float:
    """The share of predictions that are right.

    >>> accuracy([1, 0, 1, 1], [1, 1, 1, 1])
    0.75
    """
    return sum(found == right for found, right in zip(predicted, wanted, strict=True)) / len(wanted)
