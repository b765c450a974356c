"""Accuracy of a model with a classification head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lorakit.data.batches import collate
from lorakit.data.examples import Example
from lorakit.data.tokens import encode_texts
from lorakit.errors import BadData
from lorakit.evaluate import metrics
from lorakit.evaluate.setting import evaluating
from lorakit.models import longest


def classification_accuracy(
    model: Any, tokenizer: Any, examples: Sequence[Example], *, batch_size: int = 32, max_length: int = 512
) -> float:
    """The share of examples whose own class has the largest logit.

    Raises:
        BadData: an example has no label number.
    """
    wanted = [example.label for example in examples]
    if not examples or None in wanted:
        raise BadData("a classifier's accuracy needs examples, each with the number of its label; give a label column")
    encoded = encode_texts(examples, tokenizer, min(max_length, longest(model)))
    by_length = sorted(range(len(encoded)), key=lambda number: len(encoded[number].ids))
    predicted = [-1] * len(encoded)
    with evaluating(model):
        for start in range(0, len(by_length), batch_size):
            numbers = by_length[start : start + batch_size]
            batch = collate([encoded[number] for number in numbers], tokenizer.pad_token_id)
            for number, choice in zip(numbers, _choices(model, batch), strict=True):
                predicted[number] = choice
    return metrics.accuracy(predicted, wanted)


def _choices(model: Any, batch: Any) -> list[int]:
    ids, attention = batch.ids_BT.to(model.device), batch.attention_BT.to(model.device)
    return torch.argmax(model(input_ids=ids, attention_mask=attention).logits, dim=-1).tolist()
