"""The training loop: a generator of steps, each of which is taken wholly or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.core.fingerprint import fingerprint
from lorakit.core.mode import mode
from lorakit.core.routing import use
from lorakit.core.state import adapter_buffers, attached_to
from lorakit.core.stepping import rest
from lorakit.errors import BadMethod, Diverged, Interrupted, LorakitError, OutOfMemory
from lorakit.train import checkpoint, metrics
from lorakit.train.best import Evaluated, counted, evaluated, why_over
from lorakit.train.feed import Feed
from lorakit.train.folder import RunFolder
from lorakit.train.head import heads
from lorakit.train.loss import loss_for
from lorakit.train.memory import Appetite
from lorakit.train.optimiser import optimizer_for, trained_in
from lorakit.train.portions import Loss
from lorakit.train.quick import Quick
from lorakit.train.settings import Step, Train
from lorakit.train.stepper import Stepper
from lorakit.train.surroundings import held_interrupt

_log = logging.getLogger(__name__)
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
        evaluate: called every `evaluate_every` steps and after the last; its numbers go into the step, and the first
            of them, of which lower is better, is what `patience` watches.

    Raises:
        BadState: the adapter has no trainable parameter.
        OutputExists: `out` holds another run.
        NeverActed: after the first step, for a delta that no forward pass called.
        BadData: a batch has nothing to be learned.
        Diverged: a loss or gradient is no finite number; `out` has a checkpoint of the step before.
        OutOfMemory: not even one example at a time fits; likewise.
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
    plan, stepper = loop.feed.plan(loop.settings, done), loop.stepper()
    seen = [] if folder is None else evaluated(folder.path)
    try:
        if folder is not None and done:
            _catch_up(loop, folder, evaluate, seen)
        while done < loop.steps and not why_over(seen, loop.settings.patience):
            with held_interrupt() as release:
                step = stepper.take(done + 1, next(plan), release, first=done == first)
                done = step.step
            yield _finish(loop, folder, evaluate, step, release, seen)
    except KeyboardInterrupt as interrupt:
        if folder is None:
            raise
        path = folder.write(loop.checkpoint(done))
        raise Interrupted(f"stopped after step {done} of {loop.steps}; the checkpoint is {path}: run the same command "
                          "with --resume (resume=True in Python) to go on from it") from interrupt  # fmt: skip
    except (Diverged, OutOfMemory):
        if folder is not None and done:
            folder.write(loop.checkpoint(done))  # as it was after the last good step
        raise
    finally:
        rest(loop.model, loop.name)


def _finish(
    loop: _Loop,
    folder: RunFolder | None,
    evaluate: Evaluate | None,
    step: Step,
    release: Callable[[], None],
    seen: list[Evaluated],
) -> Step:
    """Evaluate, record and checkpoint a step that has been taken, where each is due."""
    try:
        release()
        if evaluate is not None and _is_evaluated(step, loop.settings):
            step = replace(step, evaluation=dict(found := evaluate()))
            seen += [Evaluated(step.step, counted(found))] if found else []
    finally:
        if folder is not None:
            folder.record(step)
    is_last = step.step == step.steps
    over = "" if is_last else why_over(seen, loop.settings.patience)
    if over:
        _log.warning(over)
    if folder is not None and (_due(step, loop.settings.checkpoint_every) or is_last or over):
        folder.write(loop.checkpoint(step.step))
    return step


def _catch_up(loop: _Loop, folder: RunFolder, evaluate: Evaluate | None, seen: list[Evaluated]) -> None:
    """Evaluate the step that the run goes on from, where Ctrl-C cut its evaluation short."""
    rows = metrics.read(folder.path) if (folder.path / metrics.METRICS).exists() else []
    if evaluate is None or not rows or rows[-1]["evaluation"]:
        return
    step = Step(**{field.name: rows[-1][field.name] for field in fields(Step) if field.name in rows[-1]})
    if _is_evaluated(step, loop.settings):
        metrics.cut_back(folder.path, step.step - 1)
        _finish(loop, folder, evaluate, step, lambda: None, seen)


def _is_evaluated(step: Step, settings: Train) -> bool:
    return _due(step, settings.evaluate_every) or step.step == step.steps


def _due(step: Step, every: int) -> bool:
    return every > 0 and step.step % every == 0


@dataclass(frozen=True, slots=True)
class _Loop:
    """One adapter's training: what decides it, and the state that a checkpoint keeps."""

    model: Any
    feed: Feed
    settings: Train
    name: str
    trained: dict[str, nn.Parameter]
    steps: int
    optimizer: torch.optim.AdamW

    def stepper(self) -> Stepper:
        """What takes the steps; the model is tried on the base, so that no delta counts as having acted."""
        with use(self.model, None), mode(self.model, training=False):
            quick, loss = Quick.of(self.model, compile=self.settings.compile), self._loss()
        given = self.model, self.feed, self.settings, self.name, self.trained, self.optimizer
        return Stepper(*given, quick, loss, Appetite(self.settings.forward_tokens), self.steps)

    def _loss(self) -> Loss:
        inserts = any(attached_to(self.model, self.name).method.inserts)
        found = loss_for(self.model, self.feed, self.settings, inserts=inserts)
        if found.trains_head:
            _refuse_untrained_head(self.model, self.name)
        return found

    def checkpoint(self, step: int) -> checkpoint.Checkpoint:
        return checkpoint.take(step, self.trained, self.optimizer, adapter_buffers(self.model, self.name))

    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to be resumed."""
        free = ("checkpoint_every", "evaluate_every", "patience", "epochs", "max_length")  # the last act through data
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
    trained = trained_in(model, name)
    steps, optimizer = feed.steps(settings), optimizer_for(model, name, trained, settings)
    return _Loop(model, feed, settings, name, trained, steps, optimizer)


def _refuse_untrained_head(model: Any, name: str) -> None:
    found = heads(model)
    adapted = {placement.path.split(".")[0] for placement in attached_to(model, name).plan}
    if found and not adapted.intersection(found):
        raise BadMethod(f"the adapter {name!r} leaves the classifier's head untrained; name it among the modules "
                        f"that the method trains whole: train=({found[-1]!r},)")  # fmt: skip
