"""Losses of rows that are padded to one length: for classifiers, and for models that cannot read flat lines.

Legend: B batch, T tokens, H hidden width, N labelled positions of a batch, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.insertion import contexts
from lorakit.core.positions import UNLABELLED
from lorakit.train.feed import Batch, Encoded, Feed
from lorakit.train.head import backward_from, sum_backward
from lorakit.train.portions import Portion


def portions(feed: Feed, examples: Sequence[Encoded], most: int, *, classes: bool = False) -> list[Portion]:
    """Batches of at most `most` places, padding counted; a longer row is one for itself."""
    found = []
    for rows in _parts(examples, most):
        batch = feed.collate(rows, feed.pad_id)
        labelled = _classes(batch) if classes else int((batch.labels_BT[:, 1:] != UNLABELLED).sum())
        found.append(Portion(batch, len(rows), labelled, batch.ids_BT.numel()))
    return found


def _parts(examples: Sequence[Encoded], most: int) -> list[list[Encoded]]:
    """In the order given where they fit; otherwise by length, so that a part holds little padding."""
    if len(examples) * max(len(example.ids) for example in examples) <= most:
        return [list(examples)]
    parts: list[list[Encoded]] = []
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        if not parts or (len(parts[-1]) + 1) * len(parts[-1][0].ids) > most:
            parts.append([])
        parts[-1].append(example)
    return parts


def _classes(batch: Batch) -> int:
    return 0 if batch.classes_B is None else len(batch.classes_B)


def picked_backward(model: Any, portion: Portion, total: float, *, smoothing: float = 0.0) -> float:
    """Next-token loss with head and cross-entropy on labelled positions alone."""
    hidden_NH, targets_N = hidden(model, portion.inputs)
    return backward_from(model, hidden_NH, targets_N, total, smoothing)


def hidden(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The hidden states that predict a label (N, H), and the labels (N)."""
    with contexts(model, _context_ends(batch)):
        hidden_BTH = model.base_model(**_inputs(model, batch), use_cache=False).last_hidden_state
    wanted_BT, targets_N = _targets(batch, hidden_BTH.device)
    return hidden_BTH[:, :-1][wanted_BT], targets_N


def whole_backward(model: Any, portion: Portion, total: float, *, smoothing: float = 0.0) -> float:
    """Next-token loss from the model's own logits: slower, right for every model."""
    batch = portion.inputs
    with contexts(model, _context_ends(batch)):
        logits_BTV = model(**_inputs(model, batch), use_cache=False).logits
    wanted_BT, targets_N = _targets(batch, logits_BTV.device)
    return sum_backward(logits_BTV[:, :-1][wanted_BT], targets_N, total, smoothing)


def classes_backward(model: Any, portion: Portion, total: float, *, smoothing: float = 0.0) -> float:
    """Cross-entropy of a classifier."""
    batch = portion.inputs
    logits_BC = model(**_inputs(model, batch)).logits
    return sum_backward(logits_BC, batch.classes_B.to(logits_BC.device), total, smoothing)


@torch.no_grad()
def heads_agree(model: Any, batch: Batch) -> bool:
    """Whether the head alone makes the model's logits, bit for bit: no scaling, no capping, no layer in between."""
    if model.base_model is model:
        return False
    inputs = _inputs(model, batch)
    found = getattr(model.base_model(**inputs, use_cache=False), "last_hidden_state", None)
    head = model.get_output_embeddings()
    if found is None or not isinstance(head, nn.Linear) or found.shape[-1] != head.in_features:
        return False
    return torch.equal(head(found).float(), model(**inputs, use_cache=False).logits.float())


def _inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    return {"input_ids": batch.ids_BT.to(model.device), "attention_mask": batch.attention_BT.to(model.device)}


def _context_ends(batch: Batch) -> Tensor:
    """Where each row's target begins."""
    return (batch.labels_BT != UNLABELLED).int().argmax(1)


def _targets(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    next_BT = batch.labels_BT[:, 1:].to(device)
    wanted_BT = next_BT != UNLABELLED
    return wanted_BT, next_BT[wanted_BT]
