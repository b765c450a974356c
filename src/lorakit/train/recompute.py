"""Blocks that keep their inputs alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorakit.errors import BadModel
from lorakit.train.settings import Train


@contextmanager
def recomputed(model: Any, settings: Train) -> Iterator[None]:
    """Keep the inputs of blocks alone, and compute the rest again, where the settings say so and the model does not."""
    if settings.checkpointing == "none" or any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        yield
        return
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before transformers 5.20
    try:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()


def refuse_unable(model: Any, settings: Train) -> None:
    """Refuse to compute blocks again where the model's code knows no such thing.

    Raises:
        BadModel: it does not.
    """
    if settings.checkpointing != "none" and not getattr(model, "supports_gradient_checkpointing", False):
        raise BadModel(f"{type(model).__name__} cannot compute its blocks again; leave out checkpointing=blocks")
