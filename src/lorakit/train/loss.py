"""The loss of a batch and its gradients.

Next-token loss is computed on labelled positions only: the hidden states that predict a label are picked out before
the head, and head and cross-entropy run over them in chunks, each chunk's gradient at once, so that no more than one
chunk of logits is ever held.

B batch, T tokens, H hidden width, N labelled positions of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.core.insertion import contexts
from lorakit.core.positions import UNLABELLED
from lorakit.errors import BadModel
from lorakit.train.feed import Batch

_log = logging.getLogger(__name__)
_CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class Loss:
    """How many things a batch teaches, and the gradients of their mean loss.

    `backward(model, batch, total)` adds the gradients of (sum of the batch's losses) / total and returns the sum.
    """

    count: Callable[[Batch], int]
    backward: Callable[[Any, Batch, int], float]
    trains_head: bool = False  # whether the model's head is the task's own, and so has to be trained


def loss_for(model: Any, batch: Batch) -> Loss:
    """The loss that fits the model: next-token for language models, classes for classifiers.

    Raises:
        BadModel: the model has neither a language-model head nor classes to learn.
    """
    if model.get_output_embeddings() is not None:
        if heads_agree(model, batch):
            return Loss(count_labels, picked_backward)
        _log.warning("%s changes its logits after the head: the loss takes the slower whole logits", _kind(model))
        return Loss(count_labels, whole_backward)
    if batch.classes_B is None:
        raise BadModel(f"{_kind(model)} has no language-model head and the examples have no class; load a causal model "
                       "for text to be written, or a classifier (labels=n) for examples with labels")  # fmt: skip
    return Loss(count_classes, classes_backward, trains_head=True)


def count_labels(batch: Batch) -> int:
    """Labelled positions that have a token before them to be predicted from."""
    return int((batch.labels_BT[:, 1:] != UNLABELLED).sum())


def count_classes(batch: Batch) -> int:
    """Examples with a class."""
    return 0 if batch.classes_B is None else len(batch.classes_B)


def picked_backward(model: Any, batch: Batch, total: int) -> float:
    """Next-token loss with head and cross-entropy on labelled positions alone."""
    with contexts(model, _context_ends(batch)):
        hidden_BTH = model.base_model(**_inputs(model, batch), use_cache=False).last_hidden_state
    wanted_BT, targets_N = _targets(batch, hidden_BTH.device)
    hidden_NH = hidden_BTH[:, :-1][wanted_BT]
    summed, gradient_NH = _head_backward(model.get_output_embeddings(), hidden_NH, targets_N, total)
    if hidden_NH.requires_grad:
        hidden_NH.backward(gradient_NH)
    return summed


def whole_backward(model: Any, batch: Batch, total: int) -> float:
    """Next-token loss from the model's own logits: slower, right for every model."""
    with contexts(model, _context_ends(batch)):
        logits_BTV = model(**_inputs(model, batch), use_cache=False).logits
    wanted_BT, targets_N = _targets(batch, logits_BTV.device)
    return _sum_backward(logits_BTV[:, :-1][wanted_BT], targets_N, total)


def classes_backward(model: Any, batch: Batch, total: int) -> float:
    """Cross-entropy of a classifier."""
    assert batch.classes_B is not None
    logits_BC = model(**_inputs(model, batch)).logits
    return _sum_backward(logits_BC, batch.classes_B.to(logits_BC.device), total)


@torch.no_grad()
def heads_agree(model: Any, batch: Batch) -> bool:
    """Whether the head alone makes the model's logits, bit for bit: no scaling, no capping, no layer in between."""
    if model.base_model is model:
        return False
    inputs = {name: tensor[:1] for name, tensor in _inputs(model, batch).items()}
    hidden = getattr(model.base_model(**inputs, use_cache=False), "last_hidden_state", None)
    head = model.get_output_embeddings()
    if hidden is None or not isinstance(head, nn.Linear) or hidden.shape[-1] != head.in_features:
        return False
    return torch.equal(head(hidden).float(), model(**inputs, use_cache=False).logits.float())


def _head_backward(head: nn.Module, hidden_NH: Tensor, targets_N: Tensor, total: int) -> tuple[float, Tensor]:
    summed, gradients = 0.0, []
    for hidden, targets in zip(hidden_NH.split(_CHUNK_ROWS), targets_N.split(_CHUNK_ROWS), strict=True):
        leaf = hidden.detach().requires_grad_(hidden_NH.requires_grad)
        summed += _sum_backward(head(leaf), targets, total)
        gradients.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    return summed, torch.cat(gradients)


def _sum_backward(logits_NV: Tensor, targets_N: Tensor, total: int) -> float:
    loss = F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
    if loss.requires_grad:
        (loss / total).backward()
    return loss.item()


def _inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    return {"input_ids": batch.ids_BT.to(model.device), "attention_mask": batch.attention_BT.to(model.device)}


def _context_ends(batch: Batch) -> Tensor:
    """Where each row's target begins."""
    return (batch.labels_BT != UNLABELLED).int().argmax(1)


def _targets(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    next_BT = batch.labels_BT[:, 1:].to(device)
    wanted_BT = next_BT != UNLABELLED
    return wanted_BT, next_BT[wanted_BT]


def _kind(model: Any) -> str:
    return type(model).__name__
