"""Perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence


def perplexity(log_probabilities: Sequence[float]) -> float:
    """exp(- mean of the natural log-probabilities of the tokens).

    >>> perplexity([math.log(0.25), math.log(0.25)])
    4.0
    """
    return math.exp(-math.fsum(log_probabilities) / len(log_probabilities))
