"""Statistics of a run's own training data, for methods and initialisations that start from data."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from lorakit.core.calibrate import calibrate
from lorakit.core.positions import UNLABELLED
from lorakit.core.sites import Site
from lorakit.core.statistics import Statistics
from lorakit.errors import BadMethod
from lorakit.train import Feed, Train


def gathered(
    model: Any, sites: Sequence[Site], needs: Collection[str], feed: Feed, settings: Train, examples: int
) -> Statistics:
    """What `sites` see of the first `examples` training examples, in the order in which they are trained on.

    Raises:
        BadMethod: not one example is asked for.
        BadData: a batch with NaN, or a layer that no batch reaches.
    """
    if examples < 1:
        raise BadMethod(f"calibrate_on={examples} leaves no data to start from; give at least one example")
    torch.manual_seed(settings.seed)
    return calibrate(model, sites, _batches(feed, settings, examples), needs=needs)


def _batches(feed: Feed, settings: Train, examples: int) -> Iterator[dict[str, torch.Tensor]]:
    numbers = [number for batch in feed.epoch(0, settings) for number in batch]
    for start in range(0, min(examples, len(numbers)), settings.batch_size):
        batch = feed.batch(list(islice(numbers, start, min(start + settings.batch_size, examples))))
        labels = batch.labels_BT if batch.classes_B is None or _written(batch.labels_BT) else batch.classes_B
        yield {"input_ids": batch.ids_BT, "attention_mask": batch.attention_BT, "labels": labels}


def _written(labels_BT: torch.Tensor) -> bool:
    return bool((labels_BT != UNLABELLED).any())
