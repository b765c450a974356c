"""One optimiser step of one adapter: gradients of everything labelled in its batches, clipped, and applied.

Several processes take it together: each has a share of every batch, and the mean is that over all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lorakit.core.mode import mode
from lorakit.core.routing import use
from lorakit.core.state import idle
from lorakit.core.stepping import after_step, before_step, penalty
from lorakit.core.twins import Quick
from lorakit.errors import BadData, Diverged, NeverActed, OutOfMemory
from lorakit.train.blame import first_bad
from lorakit.train.distributed import World
from lorakit.train.feed import Feed, Numbers
from lorakit.train.memory import Appetite, is_out_of_memory
from lorakit.train.portions import Loss, Portion
from lorakit.train.recompute import recomputed
from lorakit.train.settings import Step, Train, learning_rate
from lorakit.train.surroundings import seeded

Release = Callable[[], None]  # lets a Ctrl-C through that was held back


@dataclass(frozen=True, slots=True)
class _Share:
    """What this process has of a step, and what all of them have."""

    batches: Numbers
    portions: list[Portion]
    labelled: int  # in all processes
    spare: list[Portion]  # passes that count for nothing, where the processes have to take as many


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
    world: World

    def take(self, number: int, batches: Numbers, release: Release, *, first: bool) -> Step:
        """Step `number`; `release` lets Ctrl-C through while nothing has changed yet.

        Raises:
            BadData: a batch has nothing to be learned.
            Diverged: the loss or its gradient is no finite number; nothing has changed.
            OutOfMemory: not even one example at a time fits.
            NeverActed: after the first step, for a delta that no forward pass called.
        """
        began = time.perf_counter()
        self.optimizer.zero_grad()  # of whatever has been done with the model since
        try:
            before_step(self.model, self.name, number, self.steps)
            mean_loss, labelled, computed = self._gradients(number, batches, release)
            if first:
                _refuse_idle(self.model, self.name)
            norm = self._clip(number, mean_loss, batches)
            rate = learning_rate(number, self.steps, self.settings)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["ratio"]
            self._apply(number)
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
            labelled=labelled,
            computed=computed,
        )

    def _apply(self, number: int) -> None:
        """Take the optimiser's step; its moments take their memory in the first one, before anything changes."""
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(f"step {number}: the optimiser's moments do not fit into memory; take fewer trained "
                              "numbers (a lower rank, fewer targets)") from error  # fmt: skip

    def _gradients(self, number: int, batches: Numbers, release: Release) -> tuple[float, int, int]:
        """Gradients of the mean over everything labelled in all batches; that mean, and what was labelled and read."""
        share = self._share(number, batches)
        while True:
            try:
                summed = self._sum(number, share, release)
                break
            except (RuntimeError, MemoryError) as error:
                self._refuse(number, error)
            self.optimizer.zero_grad()  # here, where the error no longer holds what filled the memory
            self.appetite.shrink(number, share.portions)
            share = replace(share, portions=[p for portions in self._portions(share.batches) for p in portions])
        told = self.world.gather([summed, sum(portion.computed for portion in share.portions)])
        self.world.add_gradients(self.trained.values())
        return sum(row[0] for row in told) / share.labelled, share.labelled, int(sum(row[1] for row in told))

    def _refuse(self, number: int, error: BaseException) -> None:
        """Raise what cannot be mended by smaller passes."""
        if not is_out_of_memory(error):
            raise error
        if self.world.sharded:  # the others wait in the middle of a pass
            raise OutOfMemory(
                f"step {number} does not fit into the memory of process {self.world.rank}, and no pass through a base "
                "that is shared out can be divided on the way; lower forward_tokens, or set checkpointing=blocks, and "
                "resume"
            ) from error

    def _share(self, number: int, batches: Numbers) -> _Share:
        """The passes of this process, and what all of them have to know before the first."""
        own = self.feed.share(batches, self.world.rank, self.world.size, contexts=self.settings.share_contexts)
        portions = self._portions(own)
        labelled = [sum(portion.labelled for portion in each) for each in portions]
        passes, *sums = zip(*self.world.gather([sum(map(len, portions)), *labelled]), strict=True)
        for numbers, found in zip(batches, sums, strict=True):
            if not sum(found):
                raise _nothing_labelled(number, numbers)
        flat = [portion for each in portions for portion in each]
        spare = self._spare(batches) * (int(max(passes)) - len(flat)) if self.world.sharded else []
        return _Share(own, flat, int(sum(map(sum, sums))), spare)

    def _portions(self, batches: Numbers) -> list[list[Portion]]:
        """The passes of each batch; those without anything labelled are left out."""
        examples = [[self.feed.examples[each] for each in numbers] for numbers in batches]
        every = [self.loss.portions(each, self.appetite.tokens) if each else [] for each in examples]
        return [[portion for portion in portions if portion.labelled] for portions in every]

    def _spare(self, batches: Numbers) -> list[Portion]:
        """The smallest pass of a step."""
        examples = (self.feed.examples[number] for numbers in batches for number in numbers)
        return self.loss.portions([min(examples, key=lambda example: len(example.ids))], self.appetite.tokens)

    def _sum(self, number: int, share: _Share, release: Release = lambda: None) -> float:
        """Add the gradients of this process; gives the sum of its losses."""
        summed = 0.0
        with self._surroundings(number):
            for portion in share.portions:
                if self.world.size == 1:  # several stop together
                    release()
                summed += self.loss.backward(self.model, portion, share.labelled)
            for portion in share.spare:
                self.loss.backward(self.model, portion, math.inf)
            if not share.portions:
                self.optimizer.zero_grad()  # no gradient is not a gradient of zero
            added = penalty(self.model, self.name) if self.world.is_first else None
            if added is not None:
                added.backward()
        return summed

    @contextmanager
    def _surroundings(self, number: int) -> Iterator[None]:
        """What the model is in while gradients are made."""
        random = seeded(self.world.seed(self.settings.seed), number, self.model.device)
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
            share = self._share(number, [numbers])
            found = first_bad(self.model, partial(self._sum, number, share), self.trained)
            by = [bool(row[0]) for row in self.world.gather([bool(found)])]
            if any(by):
                found = self.world.told(found, by.index(True))
                where = f"in the batch of examples {_listed(numbers)}, {found}"
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
