"""Exact match."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.evaluate.metrics.accuracy import accuracy


def exact_match(texts: Sequence[str], wanted: Sequence[str]) -> float:
    """The share of texts that are the wanted ones, space around them apart.

    >>> exact_match([" positive", "negative!"], ["positive", "negative"])
    0.5
    """
    return accuracy([text.strip() for text in texts], [text.strip() for text in wanted])
