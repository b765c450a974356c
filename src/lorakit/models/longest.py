"""How long a text a model can read."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from lorakit.core.insertion import longest_insertion


def longest(model: Any) -> int:
    """How many tokens the model's positions reach; a very large number where nothing limits them.

    What an attached adapter inserts (a prefix) takes its places.

    >>> from transformers import RobertaConfig, RobertaModel
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    >>> longest(RobertaModel(RobertaConfig(**sizes, max_position_embeddings=66, pad_token_id=1)))
    64
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not positions:
        return sys.maxsize
    tables = [table for path, table in model.named_modules() if "position" in path and isinstance(table, nn.Embedding)]
    unused = [table.padding_idx + 1 for table in tables if table.padding_idx is not None]  # RoBERTa counts from there
    return int(positions) - max(unused, default=0) - longest_insertion(model)
