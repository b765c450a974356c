"""Which positions of a batch count: padding never does, and sequences stay together where data are divided.

Legend: B rows of a batch, T tokens, N all positions of a layer's input in one line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from lorakit.core.statistics import FOLDS
from lorakit.errors import BadData

UNLABELLED: Final = -100  # the label of a position from which nothing is learned: what PyTorch's cross-entropy ignores


@dataclass(frozen=True, eq=False)
class Positions:
    """The masks of one batch (True where a position counts), its number, its rows, and the rows that came before."""

    number: int
    rows: int
    before: int
    masks_BT: tuple[Tensor, ...]

    def kept(self, x: Tensor, path: str) -> Tensor | None:
        """Which of the positions of a layer's input (…, features) count, in one line; None: all of them.

        Raises:
            BadData: the batch has padding, and this input's shape does not tell where.
        """
        shape = x.shape[:-1]
        fit = [m for m in self.masks_BT if m.shape == shape or (len(shape) == 1 and m.numel() == shape.numel())]
        if any(not torch.equal(fit[0], mask) for mask in fit[1:]):
            raise BadData(
                f"batch {self.number} has encoder and decoder inputs of one shape {tuple(fit[0].shape)} with different "
                "padding, so it cannot be told which applies to a layer; pad one of them to another length"
            )
        if fit:
            return fit[0].flatten().to(x.device)
        if all(bool(mask.all()) for mask in self.masks_BT) or tuple(shape) == (self.rows,):
            return None
        raise BadData(
            f"{path} sees {tuple(shape)} positions, which does not fit the mask {tuple(self.masks_BT[0].shape)} of "
            f"batch {self.number}, so padding cannot be left out there; give batches without padding"
        )

    def folds(self, x: Tensor) -> Tensor:
        """The number of the part that each position belongs to, in one line; a sequence is in one part."""
        count = math.prod(x.shape[:-1])
        each = count // self.rows if self.rows and count % self.rows == 0 else 0
        rows_N = torch.arange(count, device=x.device) // each if each else torch.zeros(count, device=x.device)
        return (rows_N + self.before).long() % FOLDS


def positions_of(
    batch: Mapping[str, Any], number: int, before: int, *, labelled_only: bool, two_sided: bool
) -> Positions:
    """Read the masks of a batch; `two_sided` says that the model has an encoder and a decoder.

    >>> batch = {"input_ids": torch.zeros(1, 3), "attention_mask": torch.tensor([[1, 1, 0]])}
    >>> positions_of(batch, 1, 0, labelled_only=False, two_sided=False).masks_BT
    (tensor([[ True,  True, False]]),)
    """
    own, labels = _mask(batch, "attention_mask", number), batch.get("labels")
    labelled = None if labels is None else labels != UNLABELLED
    if labelled_only and (labelled is None or labelled.dim() != 2):
        raise BadData(f"batch {number} has no labels (batch, tokens), so labelled positions cannot be picked out")
    if two_sided:
        target = _target(batch, labelled, number, labelled_only=labelled_only)
        masks = [mask for mask in (own, target) if mask is not None]
    else:
        both = [mask for mask in (own, labelled if labelled_only else None) if mask is not None]
        masks = [torch.stack(both).all(0)] if both else []
    rows = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 0)
    return Positions(number, rows, before, tuple(masks))


def _target(batch: Mapping[str, Any], labelled: Tensor | None, number: int, *, labelled_only: bool) -> Tensor | None:
    """The decoder's mask; without one, labels tell where its padding is."""
    told = _mask(batch, "decoder_attention_mask", number)
    if labelled is not None and (told is None or labelled_only):
        return labelled if told is None else labelled & told
    ids = batch.get("decoder_input_ids")
    return torch.ones_like(ids, dtype=torch.bool) if told is None and ids is not None else told


def _mask(batch: Mapping[str, Any], name: str, number: int) -> Tensor | None:
    mask = batch.get(name)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise BadData(f"{name} of batch {number} has to be a tensor (batch, tokens) to tell where padding is")
    return mask.bool()
