"""The loss that fits a model, and how examples become forward passes for it.

A language model reads flat lines (`flat.py`) where its attention can keep segments apart, rows with padding
(`padded.py`) where it cannot; which of the two is found by trying both and comparing. A classifier reads rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lorakit.core.attention import reads_flat
from lorakit.core.kinds import require_one_stack
from lorakit.core.packing import pack
from lorakit.errors import BadModel
from lorakit.train import flat, padded
from lorakit.train.feed import Encoded, Feed
from lorakit.train.memory import is_out_of_memory
from lorakit.train.portions import Loss
from lorakit.train.settings import Train

_log = logging.getLogger(__name__)
_AGREE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the largest value; half precision: 5e-2


def loss_for(model: Any, feed: Feed, settings: Train, *, inserts: bool = False) -> Loss:
    """The loss that fits the model; `inserts` says that its method puts places of its own into a sequence.

    Raises:
        BadModel: the model has neither a language-model head nor classes to learn, or it is an encoder with a decoder.
    """
    require_one_stack(model)
    examples = [feed.examples[number] for number in feed.epoch(0, settings)[0]]
    rows = partial(padded.portions, feed)
    smoothing = settings.label_smoothing
    if model.get_output_embeddings() is None:
        return _classes(model, examples, rows, smoothing)
    if not padded.heads_agree(model, feed.collate(examples[:1], feed.pad_id)):
        _log.warning("%s changes its logits after the head: the loss takes the slower whole logits", _kind(model))
        return Loss(rows, partial(padded.whole_backward, smoothing=smoothing), "rows with padding, whole logits")
    why = "it was asked for" if settings.padding else _why_not_flat(model, feed, examples, inserts=inserts)
    if not why:
        lines = partial(flat.portions, share=settings.share_contexts)
        return Loss(lines, partial(flat.backward, smoothing=smoothing), "flat lines without padding")
    log = _log.info if inserts or settings.padding else _log.warning
    log("%s reads rows of about one length, with padding: %s", _kind(model), why)
    return Loss(rows, partial(padded.picked_backward, smoothing=smoothing), f"rows with padding: {why}")


def _classes(model: Any, examples: Sequence[Encoded], rows: Any, smoothing: float) -> Loss:
    if any(example.label is None for example in examples):
        raise BadModel(f"{_kind(model)} has no language-model head and the examples have no class; load a causal model "
                       "for text to be written, or a classifier (labels=n) for examples with labels")  # fmt: skip
    backward = partial(padded.classes_backward, smoothing=smoothing)
    return Loss(partial(rows, classes=True), backward, "rows with padding", trains_head=True)


def _why_not_flat(model: Any, feed: Feed, examples: Sequence[Encoded], *, inserts: bool) -> str:
    """Why the model has to read rows; "" where flat lines give the hidden states that rows give."""
    if inserts:
        return "its adapter puts places of its own into each sequence"
    longest = max(len(example.ids) for example in feed.examples)
    return reads_flat(model, longest) or _differs(model, feed, examples)


@torch.no_grad()
def _differs(model: Any, feed: Feed, examples: Sequence[Encoded]) -> str:
    tried = flat.samples(examples)
    batch = feed.collate(tried, feed.pad_id)
    try:
        found_NH, _ = flat.hidden(model, pack(tried))
    except Exception as error:  # any model's own, which was not written for this
        if is_out_of_memory(error):
            raise
        return f"its attention does not take segments ({type(error).__name__}: {error})"
    wanted_NH, _ = padded.hidden(model, batch)
    worst = (found_NH - wanted_NH).abs().max() / wanted_NH.abs().max().clamp(min=1e-30)
    if found_NH.shape == wanted_NH.shape and worst <= _AGREE.get(found_NH.dtype, 5e-2):
        return ""
    return f"read as segments its hidden states differ by {worst:.1e} of the largest"


def _kind(model: Any) -> str:
    return type(model).__name__
