"""One optimiser step of one adapter: gradients of everything labelled in its batches, clipped, and applied."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lorakit.core.mode import mode
from lorakit.core.routing import use
from lorakit.core.state import idle
from lorakit.core.stepping import after_step, before_step, penalty
from lorakit.errors import BadData, Diverged, NeverActed
from lorakit.train.blame import first_bad
from lorakit.train.feed import Feed
from lorakit.train.memory import Appetite, is_out_of_memory
from lorakit.train.portions import Loss, Portion
from lorakit.train.quick import Quick, recomputed
from lorakit.train.settings import Step, Train, learning_rate
from lorakit.train.surroundings import seeded

Numbers = list[list[int]]  # of the examples of each batch of a step


@dataclass(frozen=True, slots=True)
class Stepper:
    """What takes the steps of one adapter: its parameters and optimiser, its loss, and how much fits into memory."""

    model: Any
    feed: Feed
    settings: Train
    name: str
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    quick: Quick
    loss: Loss
    appetite: Appetite
    steps: int  # of the whole run

    def take(self, number: int, batches: Numbers, release: Callable[[], None], *, first: bool) -> Step:
        """Step `number`; `release` lets Ctrl-C through while nothing has changed yet.

        Raises:
            BadData: a batch has nothing to be learned.
            Diverged: the loss or its gradient is no finite number; nothing has changed.
            OutOfMemory: not even one example at a time fits.
            NeverActed: after the first step, for a delta that no forward pass called.
        """
        began = time.perf_counter()
        try:
            before_step(self.model, self.name, number, self.steps)
            mean_loss, portions = self._gradients(number, batches, release)
            if first:
                _refuse_idle(self.model, self.name)
            norm = self._clip(number, mean_loss, batches)
            rate = learning_rate(number, self.steps, self.settings)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["ratio"]
            self.optimizer.step()
            after_step(self.model, self.name, number, self.steps)
        finally:
            self.optimizer.zero_grad()
        return Step(
            step=number,
            steps=self.steps,
            loss=mean_loss,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=sum(len(self.feed.examples[example].ids) for numbers in batches for example in numbers),
            seconds=time.perf_counter() - began,
            labelled=sum(portion.labelled for portion in portions),
            computed=sum(portion.computed for portion in portions),
        )

    def _gradients(self, number: int, batches: Numbers, release: Callable[[], None]) -> tuple[float, list[Portion]]:
        """Gradients of the mean over everything labelled in all the batches; gives that mean and what was read."""
        while True:
            portions = self._portions(number, batches)
            try:
                return self._mean(number, portions, release), portions
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self.optimizer.zero_grad()  # here, where the error no longer holds what filled the memory
            self.appetite.shrink(number, portions)

    def _portions(self, number: int, batches: Numbers) -> list[Portion]:
        found = []
        for numbers in batches:
            portions = self.loss.portions([self.feed.examples[each] for each in numbers], self.appetite.tokens)
            if not any(portion.labelled for portion in portions):
                raise _nothing_labelled(number, numbers)
            found += [portion for portion in portions if portion.labelled]
        return found

    def _mean(self, number: int, portions: Sequence[Portion], release: Callable[[], None]) -> float:
        total, summed = sum(portion.labelled for portion in portions), 0.0
        with self._surroundings(number):
            for portion in portions:
                release()
                summed += self.loss.backward(self.model, portion, total)
            added = penalty(self.model, self.name)
            if added is not None:
                added.backward()
        return summed / total

    @contextmanager
    def _surroundings(self, number: int) -> Iterator[None]:
        """What the model is in while gradients are made."""
        random = seeded(self.settings.seed, number, self.model.device)
        adapter, training = use(self.model, self.name), mode(self.model, training=True)
        with adapter, training, random, self.quick.on(), recomputed(self.model, self.settings):
            yield

    def _clip(self, number: int, mean_loss: float, batches: Numbers) -> float:
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(mean_loss) or not torch.isfinite(norm):
            raise self._diverged(number, mean_loss, norm.item(), batches)
        if self.settings.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.trained.values(), self.settings.clip_norm, norm)
        return norm.item()

    def _diverged(self, number: int, mean_loss: float, norm: float, batches: Numbers) -> Diverged:
        """What went wrong, and in which batch: each is run once more, and watched."""
        where = ""
        for numbers in batches:
            self.optimizer.zero_grad()
            portions = self._portions(number, [numbers])
            where = first_bad(self.model, partial(self._mean, number, portions, lambda: None), self.trained)
            if where:
                where = f"in the batch of examples {_listed(numbers)}, {where}"
                break
        told = where or "run once more, all of it is finite"
        return Diverged(
            f"step {number} has a loss of {mean_loss} and a gradient of length {norm}, so it changed nothing; {told}: "
            "lower learning_rate, look at these examples, or train in a wider dtype"
        )


def _nothing_labelled(number: int, examples: list[int]) -> BadData:
    return BadData(
        f"step {number} reads a batch (examples {_listed(examples)}) without a labelled token, so there is nothing to "
        "learn from it; raise max_length, or check the targets of these examples"
    )


def _refuse_idle(model: Any, name: str) -> None:
    idle_paths = idle(model, name)
    if idle_paths:
        more = f" and {len(idle_paths) - 8} more" if len(idle_paths) > 8 else ""
        raise NeverActed(f"the adapter {name!r} did not act at {', '.join(idle_paths[:8])}{more}: no forward pass "
                         "calls them, so they would never be trained; choose other targets")  # fmt: skip


def _listed(examples: Sequence[int]) -> str:
    return ", ".join(map(str, examples[:8])) + (" ..." if len(examples) > 8 else "")
