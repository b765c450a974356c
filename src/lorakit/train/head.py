"""The model's head: its loss over hidden states, and where a classifier has one.

Legend: N labelled positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.kernels.cross_entropy import CHUNK_ROWS, linear_cross_entropy


def heads(model: Any) -> list[str]:
    """Names of the modules that turn what the body found into the task's answer.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> heads(BertForSequenceClassification(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)))
    ['classifier']
    """
    beside = [(name, child) for name, child in model.named_children() if child is not model.base_model]
    return [name for name, child in beside if next(child.parameters(), None) is not None]


def backward_from(model: Any, hidden_NH: Tensor, targets_N: Tensor, total: float, smoothing: float = 0.0) -> float:
    """The summed cross-entropy of the head's logits; adds the gradients of (it / total) to all that made them.

    A frozen head is a product and nothing else; one that is adapted or trained gets its own gradients, chunk by chunk.
    """
    head = model.get_output_embeddings()
    if _is_frozen(head):
        with torch.no_grad():
            loss, gradient_NH = linear_cross_entropy(
                hidden_NH.detach(), head.weight, head.bias, targets_N, scale=1 / total, smoothing=smoothing
            )
        summed = loss.item()
    else:
        summed, gradient_NH = _called(head, hidden_NH, targets_N, total, smoothing)
    if hidden_NH.requires_grad:
        hidden_NH.backward(gradient_NH)
    return summed


def _is_frozen(head: nn.Module) -> bool:
    """Whether calling it would do no more than multiply by its weight."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and not any(hooks)
    return plain and not any(parameter.requires_grad for parameter in head.parameters())


def _called(
    head: nn.Module, hidden_NH: Tensor, targets_N: Tensor, total: float, smoothing: float
) -> tuple[float, Tensor]:
    summed, gradients = 0.0, []
    for hidden, targets in zip(hidden_NH.split(CHUNK_ROWS), targets_N.split(CHUNK_ROWS), strict=True):
        leaf = hidden.detach().requires_grad_(hidden_NH.requires_grad)
        summed += sum_backward(head(leaf), targets, total, smoothing)
        gradients.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    return summed, torch.cat(gradients)


def sum_backward(logits_NV: Tensor, targets_N: Tensor, total: float, smoothing: float = 0.0) -> float:
    """Add the gradients of (summed cross-entropy / total); gives the sum."""
    loss = F.cross_entropy(logits_NV.float(), targets_N, reduction="sum", label_smoothing=smoothing)
    if loss.requires_grad:
        (loss / total).backward()
    return loss.item()
