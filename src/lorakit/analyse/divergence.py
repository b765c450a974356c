"""How far an adapter moves what a language model predicts.

Legend: B batch, T tokens, N positions, V vocabulary.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

_CHUNK_ROWS: Final = 256  # of logits that are in float32 at once


def divergence(base_NV: Tensor, adapted_NV: Tensor) -> Tensor:
    """D(adapter ‖ base) = Σ p' ln(p' / p) at each position (N,), in nats, of logits: 0 where nothing changed.

    >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 200.0]]))  # ln 2: from a coin to certainty
    tensor([0.6931])
    """
    found = []
    for base, adapted in zip(base_NV.split(_CHUNK_ROWS), adapted_NV.split(_CHUNK_ROWS), strict=True):
        before, after = (logits.float().log_softmax(-1) for logits in (base, adapted))
        terms = torch.where(after.isneginf(), 0.0, after.exp() * (after - before))
        found.append(terms.sum(-1).clamp(min=0))  # below 0 by rounding only
    return torch.cat(found) if found else base_NV.new_zeros(0)


def has_writer(model: nn.Module) -> bool:
    """Whether a model has a language-model head."""
    head = getattr(model, "get_output_embeddings", None)
    return head is not None and head() is not None
