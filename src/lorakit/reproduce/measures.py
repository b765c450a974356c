"""What a run measures: named numbers of a model on a data set's test examples, and its loss on held-out ones.

B batch, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from lorakit import evaluate
from lorakit.core.mode import mode
from lorakit.core.routing import What
from lorakit.data import Dataset, Encoded, collate
from lorakit.errors import BadData, UnknownName, nearest
from lorakit.evaluate.scores import Request, log_probabilities
from lorakit.train.settings import check, counts

Measure = Callable[[Any, Any, Dataset, "Evaluate"], float]


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What is measured: on the test examples of base and adapter, on held-out training examples during training."""

    measures: tuple[str, ...] | str = ()  # accuracy, exact_match, perplexity; none named: what fits the data
    batch_size: int = 32  # examples in one forward pass
    max_length: int = 512  # tokens of one example
    max_new_tokens: int = 32  # longest text that exact_match lets the model write
    held_out: int = 128  # training examples that are not trained on but evaluated every train.evaluate_every steps

    def __post_init__(self) -> None:
        split = self.measures.split(",") if isinstance(self.measures, str) else self.measures
        object.__setattr__(self, "measures", tuple(name.strip() for name in split if name.strip()))
        for name in self.measures:
            if name not in MEASURES:
                raise UnknownName(f"there is no measure called {name!r}; {nearest(name, MEASURES)}")
        sizes = {"batch_size": self.batch_size, "max_length": self.max_length, "max_new_tokens": self.max_new_tokens}
        check("evaluate with", counts(**sizes, held_out=self.held_out))


def _accuracy(model: Any, tokenizer: Any, data: Dataset, settings: Evaluate) -> float:
    limits = {"batch_size": settings.batch_size, "max_length": settings.max_length}
    if classifies(model):
        return evaluate.classification_accuracy(model, tokenizer, data.test, **limits)
    return evaluate.label_accuracy(model, tokenizer, data.test, data.labels, **limits)


def _exact_match(model: Any, tokenizer: Any, data: Dataset, settings: Evaluate) -> float:
    new, batch = settings.max_new_tokens, settings.batch_size
    return evaluate.exact_match(model, tokenizer, data.test, max_new_tokens=new, batch_size=batch)


def _perplexity(model: Any, tokenizer: Any, data: Dataset, settings: Evaluate) -> float:
    limits = {"batch_size": settings.batch_size, "max_length": settings.max_length}
    return evaluate.perplexity(model, tokenizer, data.test, **limits)


MEASURES: Mapping[str, Measure] = {"accuracy": _accuracy, "exact_match": _exact_match, "perplexity": _perplexity}


def classifies(model: Any) -> bool:
    """Whether the model has a classification head instead of a language model's."""
    return model.get_output_embeddings() is None


def chosen(model: Any, data: Dataset, settings: Evaluate) -> Sequence[str]:
    """The measures asked for, or those that fit: accuracy where there are labels, otherwise perplexity."""
    return settings.measures or (("accuracy",) if data.labels else ("perplexity",))


def measure(model: Any, tokenizer: Any, data: Dataset, settings: Evaluate) -> dict[str, float]:
    """The chosen measures of the model as it stands, on the test examples.

    Raises:
        BadData: there are no test examples.
    """
    if not data.test:
        raise BadData(f"{data.name} has no test examples to measure on; give a test file or a test_share")
    return {name: MEASURES[name](model, tokenizer, data, settings) for name in chosen(model, data, settings)}


def compare(
    model: Any, tokenizer: Any, data: Dataset, settings: Evaluate, sides: Mapping[str, What]
) -> dict[str, dict[str, float]]:
    """The measures under each of several adapters: {side: {measure: value}}."""
    return evaluate.compare(model, sides, lambda: measure(model, tokenizer, data, settings))


def mean_loss(model: Any, examples: Sequence[Encoded], pad_id: int, batch_size: int) -> float:
    """What training lowers, without dropout: the mean loss over target tokens, or over a classifier's examples."""
    if classifies(model):
        batches = (examples[start : start + batch_size] for start in range(0, len(examples), batch_size))
        return math.fsum(_class_loss(model, batch, pad_id) for batch in batches) / len(examples)
    requests = [Request(e.ids[:-1], tuple(range(e.start - 1, len(e.ids) - 1)), e.ids[e.start :]) for e in examples]
    found = [value for values in log_probabilities(model, requests, batch_size) for value in values]
    return -math.fsum(found) / len(found)


@torch.no_grad()
def _class_loss(model: Any, examples: Sequence[Encoded], pad_id: int) -> float:
    batch, classes = collate(examples, pad_id), torch.tensor([example.label for example in examples])
    ids, attention = batch.ids_BT.to(model.device), batch.attention_BT.to(model.device)
    with mode(model, training=False):
        logits_BC = model(input_ids=ids, attention_mask=attention).logits.float()
    return F.cross_entropy(logits_BC.cpu(), classes, reduction="sum").item()
