"""The setting in which a model is evaluated, and base and adapter side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from lorakit.core.mode import mode
from lorakit.core.routing import What, use
from lorakit.core.twins import Quick
from lorakit.errors import BadModel

Result = TypeVar("Result")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, faster products; each module is put back into its own mode afterwards."""
    with mode(model, training=False), Quick.products(model).on(), torch.no_grad():
        yield


def require_writer(model: Any) -> None:
    """Refuse a model without a language-model head.

    Raises:
        BadModel: it neither writes texts nor tells how likely they are.
    """
    if model.get_output_embeddings() is None:
        raise BadModel(f"{type(model).__name__} has no language-model head, so it neither writes texts nor tells how "
                       "likely they are; a classifier can be measured by its accuracy")  # fmt: skip


def compare(model: nn.Module, sides: Mapping[str, What], measure: Callable[[], Result]) -> dict[str, Result]:
    """Measure the model under each of several adapters.

    Example:
        ```python
        compare(model, {"base": None, "adapter": "reviews"}, lambda: label_accuracy(model, tokenizer, examples, labels))
        ```
    """
    found = {}
    for side, what in sides.items():
        with use(model, what):
            found[side] = measure()
    return found
