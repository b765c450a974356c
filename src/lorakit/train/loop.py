"""The training loop: a generator of steps, each of which is taken wholly or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.core.attach import parameters
from lorakit.core.fingerprint import fingerprint
from lorakit.core.mode import mode
from lorakit.core.routing import use
from lorakit.core.state import adapter_buffers, adapter_tensors, attached_to, deltas_of, idle
from lorakit.core.stepping import after_step, before_step, penalty, rest
from lorakit.errors import BadData, BadMethod, BadState, Interrupted, LorakitError, NeverActed
from lorakit.train import checkpoint
from lorakit.train.feed import Feed
from lorakit.train.folder import RunFolder
from lorakit.train.head import heads
from lorakit.train.loss import loss_for
from lorakit.train.portions import Loss, Portion
from lorakit.train.quick import Quick, recomputed
from lorakit.train.settings import Step, Train, learning_rate
from lorakit.train.surroundings import held_interrupt, seeded

Steps = Generator[Step, None, None]
Evaluate = Callable[[], Mapping[str, float]]


def run(
    model: Any,
    feed: Feed,
    settings: Train,
    *,
    name: str = "default",
    out: str | Path | None = None,
    resume: bool = False,
    evaluate: Evaluate | None = None,
) -> Steps:
    """Train one adapter of a model, one `Step` at a time; logging, stopping and saving are the caller's lines.

    Between two steps the model is as the caller left it: training mode, active adapter and random state are set for
    each step and put back. Ctrl-C ends the run after the step (or forward pass) in hand.

    Args:
        model: a transformers model with an attached, trainable adapter.
        feed: the examples, and how they are ordered and put together.
        settings: how to train.
        name: the adapter to be trained; nothing else is.
        out: a folder for `metrics.jsonl` and checkpoints; None keeps nothing.
        resume: go on from the newest checkpoint in `out`, to the same bits as an uninterrupted run.
        evaluate: called every `evaluate_every` steps and after the last; its numbers go into the step.

    Raises:
        BadState: the adapter has no trainable parameter.
        OutputExists: `out` holds another run.
        NeverActed: after the first step, for a delta that no forward pass called.
        BadData: a batch has nothing to be learned.
        Interrupted: Ctrl-C, once a checkpoint has been written to `out`.

    Example:
        ```python
        feed = Feed(examples, tokenizer.pad_token_id, collate, order)
        for step in train.run(model, feed, Train(steps=100), name="reviews", out="out/reviews"):
            print(step.step, step.loss)
        lk.save(model, "reviews", "out/reviews")
        ```
    """
    loop = _loop(model, feed, settings, name)
    folder = None if out is None else RunFolder(Path(out), loop.identity())
    if folder is not None:
        folder.refuse_other_run(resume=resume)
    elif resume:
        raise LorakitError("resume=True needs the output folder of the run that is to go on; give out=")
    return _steps(loop, folder, evaluate)


def _steps(loop: _Loop, folder: RunFolder | None, evaluate: Evaluate | None) -> Steps:
    found = None if folder is None else folder.begin()
    if found is not None:
        checkpoint.restore(found, loop.trained, loop.optimizer, adapter_buffers(loop.model, loop.name))
    done = first = 0 if found is None else found.step
    plan, loss = loop.feed.plan(loop.settings, done), loop.loss()
    try:
        while done < loop.steps:
            with held_interrupt() as release:
                step = loop.take(done + 1, next(plan), loss, release, first=done == first)
                done = step.step
            yield _finish(loop, folder, evaluate, step, release)
    except KeyboardInterrupt as interrupt:
        if folder is None:
            raise
        path = folder.write(loop.checkpoint(done))
        raise Interrupted(f"stopped after step {done} of {loop.steps}; the checkpoint is {path}: run the same command "
                          "with --resume (resume=True in Python) to go on from it") from interrupt  # fmt: skip
    finally:
        rest(loop.model, loop.name)


def _finish(
    loop: _Loop, folder: RunFolder | None, evaluate: Evaluate | None, step: Step, release: Callable[[], None]
) -> Step:
    """Evaluate, record and checkpoint a step that has been taken, where each is due."""
    due = _due(step, loop.settings.evaluate_every) or step.step == step.steps
    try:
        release()
        if evaluate is not None and due:
            step = replace(step, evaluation=dict(evaluate()))
    finally:
        if folder is not None:
            folder.record(step)
    if folder is not None and (_due(step, loop.settings.checkpoint_every) or step.step == step.steps):
        folder.write(loop.checkpoint(step.step))
    return step


@dataclass(frozen=True, slots=True)
class _Loop:
    model: Any
    feed: Feed
    settings: Train
    name: str
    trained: dict[str, nn.Parameter]
    steps: int
    optimizer: torch.optim.AdamW
    quick: Quick

    def take(
        self, number: int, batches: list[list[int]], loss: Loss, release: Callable[[], None], *, first: bool
    ) -> Step:
        """One optimiser step; `release` lets Ctrl-C through while nothing has changed yet."""
        began = time.perf_counter()
        try:
            before_step(self.model, self.name, number, self.steps)
            mean_loss, portions = self._gradients(number, batches, loss, release)
            if first:
                _refuse_idle(self.model, self.name)
            norm = self._clip(number, mean_loss)
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

    def _gradients(
        self, number: int, batches: list[list[int]], loss: Loss, release: Callable[[], None]
    ) -> tuple[float, list[Portion]]:
        """Gradients of the mean over everything labelled in all the batches; gives that mean and what was read."""
        portions = []
        for numbers in batches:
            found = loss.portions([self.feed.examples[each] for each in numbers], self.settings.forward_tokens)
            if not any(portion.labelled for portion in found):
                raise _nothing_labelled(number, numbers)
            portions += [portion for portion in found if portion.labelled]
        total, summed, device = sum(portion.labelled for portion in portions), 0.0, self.model.device
        state = use(self.model, self.name), mode(self.model, training=True), seeded(self.settings.seed, number, device)
        with state[0], state[1], state[2], self.quick.on(), recomputed(self.model, self.settings):
            for portion in portions:
                release()
                summed += loss.backward(self.model, portion, total)
            added = penalty(self.model, self.name)
            if added is not None:
                added.backward()
        return summed / total, portions

    def _clip(self, number: int, mean_loss: float) -> float:
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(mean_loss) or not torch.isfinite(norm):
            raise LorakitError(f"step {number} has a loss of {mean_loss} and a gradient of length {norm.item()}; it "
                               "changed nothing: lower learning_rate, or train in a wider dtype")  # fmt: skip
        if self.settings.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.trained.values(), self.settings.clip_norm, norm)
        return norm.item()

    def loss(self) -> Loss:
        """The loss that fits the model, tried on the base so that no delta counts as having acted."""
        with use(self.model, None), mode(self.model, training=False):
            inserts = any(attached_to(self.model, self.name).method.inserts)
            found = loss_for(self.model, self.feed, self.settings, inserts=inserts)
        if found.trains_head:
            _refuse_untrained_head(self.model, self.name)
        return found

    def checkpoint(self, step: int) -> checkpoint.Checkpoint:
        return checkpoint.take(step, self.trained, self.optimizer, adapter_buffers(self.model, self.name))

    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to be resumed."""
        free = ("checkpoint_every", "evaluate_every", "patience", "epochs", "max_length")  # those act through steps and data
        settings = {key: value for key, value in asdict(self.settings).items() if key not in free}
        record = attached_to(self.model, self.name)
        base = json.dumps(fingerprint(self.model, [placement.path for placement in record.plan]))
        identity = {
            **settings,
            "steps": self.steps,
            "method": record.method.to_json(),
            "plan": hashlib.sha256(repr(record.plan).encode()).hexdigest(),
            "base": hashlib.sha256(base.encode()).hexdigest(),
            "data": self.feed.digest(),
        }
        return dict(json.loads(json.dumps(identity)))  # as it reads when it comes back from the file


def _loop(model: Any, feed: Feed, settings: Train, name: str) -> _Loop:
    trained = _trained(model, name)
    optimizer = torch.optim.AdamW(_groups(model, name, trained, settings), weight_decay=settings.weight_decay)
    with use(model, None):
        quick = Quick.of(model)
    return _Loop(model, feed, settings, name, trained, feed.steps(settings), optimizer, quick)


def _trained(model: Any, name: str) -> dict[str, nn.Parameter]:
    """The adapter's trainable parameters by path."""
    wanted = {id(parameter) for parameter in parameters(model, name)}
    if not wanted:
        raise BadState(f"the adapter {name!r} has no trainable parameter; attach one, or load(..., trainable=True)")
    return {key: parameter for key, parameter in adapter_tensors(model, name).items() if id(parameter) in wanted}


def _groups(model: Any, name: str, trained: Mapping[str, nn.Parameter], settings: Train) -> list[dict[str, Any]]:
    """The optimiser's groups: LoRA+ (Hayou et al. 2024, arXiv:2402.12354) lets the output's side learn faster.

    Raises:
        BadMethod: a ratio for a method whose factors have no sides.
    """
    if settings.outer_ratio == 1:
        return [{"params": list(trained.values()), "ratio": 1.0}]
    sides = [(delta.outer, key, p) for delta in deltas_of(model, name) for key, p in delta.named_parameters()]
    outer = {id(parameter) for names, key, parameter in sides if key in names}
    if not outer:
        raise BadMethod(f"outer_ratio={settings.outer_ratio:g} needs factors on an output's side (LoRA's B), and "
                        f"{attached_to(model, name).method.name} has none; leave it at 1")  # fmt: skip
    fast = [parameter for parameter in trained.values() if id(parameter) in outer]
    slow = [parameter for parameter in trained.values() if id(parameter) not in outer]
    return [{"params": slow, "ratio": 1.0}, {"params": fast, "ratio": settings.outer_ratio}]


def _refuse_untrained_head(model: Any, name: str) -> None:
    found = heads(model)
    adapted = {placement.path.split(".")[0] for placement in attached_to(model, name).plan}
    if found and not adapted.intersection(found):
        raise BadMethod(f"the adapter {name!r} leaves the classifier's head untrained; name it among the modules "
                        f"that the method trains whole: train=({found[-1]!r},)")  # fmt: skip


def _nothing_labelled(number: int, examples: list[int]) -> BadData:
    shown = ", ".join(map(str, examples[:8])) + (" ..." if len(examples) > 8 else "")
    return BadData(f"step {number} reads a batch (examples {shown}) without a labelled token, so there is nothing to "
                   "learn from it; raise max_length, or check the targets of these examples")  # fmt: skip


def _refuse_idle(model: Any, name: str) -> None:
    idle_paths = idle(model, name)
    if idle_paths:
        more = f" and {len(idle_paths) - 8} more" if len(idle_paths) > 8 else ""
        raise NeverActed(f"the adapter {name!r} did not act at {', '.join(idle_paths[:8])}{more}: no forward pass "
                         "calls them, so they would never be trained; choose other targets")  # fmt: skip


def _due(step: Step, every: int) -> bool:
    return every > 0 and step.step % every == 0
