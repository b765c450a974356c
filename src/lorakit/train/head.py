"""The head of a classifier: the modules beside the model's body that have parameters."""

from __future__ import annotations

from typing import Any


def heads(model: Any) -> list[str]:
    """Names of the modules that turn what the body found into the task's answer.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> heads(BertForSequenceClassification(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)))
    ['classifier']
    """
    beside = [(name, child) for name, child in model.named_children() if child is not model.base_model]
    return [name for name, child in beside if next(child.parameters(), None) is not None]
