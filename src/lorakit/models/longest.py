"""How long a text a model can read."""

from __future__ import annotations

import sys
from typing import Any

from lorakit.core.insertion import longest_insertion
from lorakit.core.stack import longest_of


def longest(model: Any) -> int:
    """How many tokens the model's positions reach; a very large number where nothing limits them.

    What an attached adapter inserts (a prefix) takes its places.

    >>> from transformers import RobertaConfig, RobertaModel
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    >>> longest(RobertaModel(RobertaConfig(**sizes, max_position_embeddings=66, pad_token_id=1)))
    64
    """
    return (longest_of(model) or sys.maxsize) - longest_insertion(model)
