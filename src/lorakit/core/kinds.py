"""Which kinds of model a training loop reads."""

from __future__ import annotations

from typing import Any

from lorakit.errors import BadModel


def require_one_stack(model: Any) -> None:
    """Refuse a model that reads by one stack of blocks and writes by another (T5).

    Raises:
        BadModel: it is an encoder with a decoder.

    >>> from transformers import T5Config, T5Model
    >>> require_one_stack(T5Model(T5Config(d_model=8, d_kv=4, num_heads=2, num_layers=1, d_ff=8, vocab_size=8)))
    Traceback (most recent call last):
    lorakit.errors.BadModel: T5Model reads by an encoder and writes by a decoder, which the loop does not train; ...
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise BadModel(
            f"{type(model).__name__} reads by an encoder and writes by a decoder, which the loop does not train; take "
            "a causal model or an encoder, or transformers' Trainer with lorakit's callback"
        )
