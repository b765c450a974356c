"""What a run measures: named numbers of a model on a data set's test examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit import evaluate
from lorakit.core.routing import What
from lorakit.data import Dataset
from lorakit.errors import BadData, UnknownName, nearest
from lorakit.train.settings import check, counts

Measure = Callable[[Any, Any, Dataset, "Evaluate"], float]


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What is measured on the test examples, of the base and of the adapter."""

    measures: tuple[str, ...] | str = ()  # accuracy, exact_match, perplexity; none named: what fits the data
    batch_size: int = 32  # examples in one forward pass
    max_length: int = 512  # tokens of one example
    max_new_tokens: int = 32  # longest text that exact_match lets the model write

    def __post_init__(self) -> None:
        split = self.measures.split(",") if isinstance(self.measures, str) else self.measures
        object.__setattr__(self, "measures", tuple(name.strip() for name in split if name.strip()))
        for name in self.measures:
            if name not in MEASURES:
                raise UnknownName(f"there is no measure called {name!r}; {nearest(name, MEASURES)}")
        sizes = {"batch_size": self.batch_size, "max_length": self.max_length, "max_new_tokens": self.max_new_tokens}
        check("evaluate with", counts(**sizes))


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
