"""What a training run is told, and what it tells of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from lorakit.errors import LorakitError

Rule = tuple[str, object, str, bool]  # a setting, its value, what it must be, whether it is that
LARGEST_SEED = 2**63 - 1


def check(purpose: str, rules: Iterable[Rule]) -> None:
    """Refuse settings that break their rules, all in one sentence.

    >>> check("train with", [("steps", 0, "at least 1", False)])
    Traceback (most recent call last):
    lorakit.errors.LorakitError: there is no way to train with these settings: steps=0 must be at least 1
    """
    if faults := [f"{name}={value!r} must be {wanted}" for name, value, wanted, kept in rules if not kept]:
        raise LorakitError(f"there is no way to {purpose} these settings: {'; '.join(faults)}")


def counts(**values: int) -> list[Rule]:
    """The rule of whole numbers that must be 1 or more."""
    return [(name, value, "at least 1", value >= 1) for name, value in values.items()]


def seed_rule(seed: int) -> Rule:
    """The rule of a seed: what PyTorch takes."""
    return ("seed", seed, f"from 0 to {LARGEST_SEED}", 0 <= seed <= LARGEST_SEED)


@dataclass(frozen=True, kw_only=True)
class Train:
    """How to train: AdamW with a linear warm-up and a linear decay.

    Raises:
        LorakitError: values that cannot be trained with, all of them in one sentence.

    Example:
        >>> Train(epochs=3, learning_rate=5e-4).batch_size
        16
    """

    steps: int | None = None  # optimiser steps; None: as many as the epochs make
    epochs: float = 1.0  # passes over the examples, when `steps` is not given
    batch_size: int = 16  # examples in one batch
    accumulate: int = 1  # batches in one optimiser step
    forward_tokens: int = 8192  # most tokens in one forward pass; a larger batch is divided, with the same result
    share_contexts: bool = True  # examples of one context come together, and what they begin with is computed once
    padding: bool = False  # rows with padding even where the model could do without
    learning_rate: float = 1e-3  # at the end of the warm-up
    warmup_share: float = 0.06  # part of the steps in which the learning rate rises from 0
    outer_ratio: float = 1.0  # LoRA+: how many times faster the factors on the output's side (B) learn
    weight_decay: float = 0.0  # AdamW's
    label_smoothing: float = 0.0  # share of a target's probability that is spread over the whole vocabulary
    clip_norm: float = 1.0  # longest gradient; 0 never clips
    seed: int = 0  # governs data order and dropout
    max_length: int = 512  # tokens of one example
    checkpoint_every: int = 0  # steps between checkpoints; 0 writes only the last, or where the run is interrupted
    evaluate_every: int = 0  # steps between evaluations; 0: after the last alone, from the command line none
    patience: int = 0  # evaluations without improvement after which training stops; 0 never stops
    checkpointing: Literal["none", "blocks"] = "none"  # blocks: keep their inputs alone, and compute the rest again
    sharding: Literal["auto", "replicate", "shard"] = "auto"  # of several devices: each a copy of the base, or a part
    compile: bool = False  # compile each block instead of using twins: slow at the start

    def __post_init__(self) -> None:
        check("train with", self._rules())

    def _rules(self) -> list[Rule]:
        intervals = {name: getattr(self, name) for name in ("checkpoint_every", "evaluate_every", "patience")}
        plain = not (self.compile and self.checkpointing == "blocks")
        amounts = {"weight_decay": self.weight_decay, "clip_norm": self.clip_norm, **intervals}
        return [
            ("steps", self.steps, "at least 1, or left out", self.steps is None or self.steps >= 1),
            ("epochs", self.epochs, "above 0", 0 < self.epochs < math.inf),
            ("learning_rate", self.learning_rate, "above 0", 0 < self.learning_rate < math.inf),
            ("outer_ratio", self.outer_ratio, "above 0", 0 < self.outer_ratio < math.inf),
            ("warmup_share", self.warmup_share, "from 0 to 1", 0 <= self.warmup_share <= 1),
            ("label_smoothing", self.label_smoothing, "from 0 to below 1", 0 <= self.label_smoothing < 1),
            ("checkpointing", self.checkpointing, "none or blocks", self.checkpointing in ("none", "blocks")),
            ("compile", self.compile, "False where checkpointing is blocks, of which PyTorch compiles nothing", plain),
            ("sharding", self.sharding, "auto, replicate or shard", self.sharding in ("auto", "replicate", "shard")),
            *counts(batch_size=self.batch_size, accumulate=self.accumulate),
            *counts(forward_tokens=self.forward_tokens, max_length=self.max_length),
            seed_rule(self.seed),
            *((name, value, "0 or more", value >= 0) for name, value in amounts.items()),
        ]


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimiser step was: the loss is the mean over its labelled tokens (or classified examples)."""

    step: int  # from 1
    steps: int  # of the whole run
    loss: float
    learning_rate: float
    gradient_norm: float  # before clipping
    tokens: int  # of its examples, padding not counted
    seconds: float
    evaluation: Mapping[str, float] | None = None
    labelled: int = 0  # things learned from: tokens, or classes
    computed: int = 0  # places that went through the model: padding counted, shared contexts once

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the examples in a second of this step."""
        return self.tokens / self.seconds


def learning_rate(step: int, steps: int, settings: Train) -> float:
    """The rate of step 1 <= s <= S with a warm-up of W steps: peak s/W, then peak (S - s + 1)/(S - W).

    >>> [learning_rate(step, 6, Train(learning_rate=1.0, warmup_share=0.33)) for step in range(1, 7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup_steps = round(settings.warmup_share * steps)
    if step <= warmup_steps:
        return settings.learning_rate * step / warmup_steps
    return settings.learning_rate * (steps - step + 1) / (steps - warmup_steps)
