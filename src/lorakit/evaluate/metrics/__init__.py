"""Metrics: one pure function a file."""

from lorakit.evaluate.metrics.accuracy import accuracy
from lorakit.evaluate.metrics.exact_match import exact_match
from lorakit.evaluate.metrics.perplexity import perplexity

__all__ = ["accuracy", "exact_match", "perplexity"]
