"""Evaluate a model under whatever adapter is in use, and base and adapter side by side."""

from lorakit.evaluate.classification import classification_accuracy
from lorakit.evaluate.generation import exact_match, generate_texts
from lorakit.evaluate.likelihood import label_accuracy, label_scores, perplexity
from lorakit.evaluate.setting import compare

__all__ = [
    "classification_accuracy",
    "compare",
    "exact_match",
    "generate_texts",
    "label_accuracy",
    "label_scores",
    "perplexity",
]
