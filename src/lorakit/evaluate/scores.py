"""Log-probabilities that a causal model gives to tokens, computed at the wanted positions only.

B batch, T tokens, C columns at which logits are wanted, N wanted tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lorakit.core.insertion import contexts
from lorakit.evaluate.setting import evaluating, require_writer

_CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class Request:
    """How likely is `tokens[i]` right after position `positions[i]` of `ids`?"""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[int, ...]


def log_probabilities(model: Any, requests: Sequence[Request], batch_size: int) -> list[list[float]]:
    """The natural log-probability of each wanted token, request by request.

    Requests of like length share a batch, padded on the right, so that padding costs little and changes nothing.

    Raises:
        BadModel: the model has no language-model head.
    """
    require_writer(model)
    found: list[list[float]] = [[] for _ in requests]
    by_length = sorted(range(len(requests)), key=lambda number: len(requests[number].ids))
    with evaluating(model):
        for start in range(0, len(by_length), batch_size):
            numbers = by_length[start : start + batch_size]
            values = iter(_of_batch(model, [requests[number] for number in numbers]))
            for number in numbers:
                found[number] = [next(values) for _ in requests[number].tokens]
    return found


def _of_batch(model: Any, requests: list[Request]) -> list[float]:
    columns_C = sorted({position for request in requests for position in request.positions})
    rows_N = [row for row, request in enumerate(requests) for _ in request.positions]
    places_N = [columns_C.index(position) for request in requests for position in request.positions]
    tokens_N = torch.tensor([token for request in requests for token in request.tokens], device=model.device)
    logits_NV = _logits(model, requests, columns_C)[rows_N, places_N]
    scored = [
        -F.cross_entropy(logits.float(), tokens, reduction="none")
        for logits, tokens in zip(logits_NV.split(_CHUNK_ROWS), tokens_N.split(_CHUNK_ROWS), strict=True)
    ]
    return torch.cat(scored).tolist() if scored else []


def _logits(model: Any, requests: list[Request], columns_C: list[int]) -> Tensor:
    """Logits (B, C, V); the head runs at the wanted columns only where the model's forward can do so."""
    rows = [torch.tensor(request.ids) for request in requests]
    ids_BT = pad_sequence(rows, batch_first=True).to(model.device)
    attention_BT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
    columns = torch.tensor(columns_C, device=model.device)
    inputs = {"input_ids": ids_BT, "attention_mask": attention_BT, "use_cache": False}
    with contexts(model, torch.tensor([min(request.positions, default=0) + 1 for request in requests])):
        if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
            return model(**inputs, logits_to_keep=columns).logits
        return model(**inputs).logits[:, columns]
