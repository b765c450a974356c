"""The training loop: a generator of steps, each of which is taken wholly or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.core.fingerprint import fingerprint
from lorakit.core.mode import mode
from lorakit.core.routing import use
from lorakit.core.state import adapter_buffers, attached_to
from lorakit.core.stepping import rest
from lorakit.core.twins import Quick
from lorakit.errors import BadMethod, Diverged, Interrupted, LorakitError, OutOfMemory
from lorakit.train import checkpoint
from lorakit.train.best import Evaluated, counted, why_over
from lorakit.train.distributed import World, is_lost, join, lost, share_out
from lorakit.train.feed import Feed
from lorakit.train.folder import RunFolder
from lorakit.train.head import heads
from lorakit.train.loss import loss_for
from lorakit.train.memory import Appetite
from lorakit.train.optimiser import optimizer_for, trained_in
from lorakit.train.planner import plan_attached
from lorakit.train.portions import Loss
from lorakit.train.recompute import refuse_unable
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

    Where this is one of several processes (`lorakit.train.distributed.opened`), all of them train together: each calls
    this with the same arguments, and steps as often; `evaluate` is called in each, and the first one's numbers count.

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
        BadModel: the model cannot be trained so.
        OutputExists: `out` holds another run.
        NeverActed: after the first step, for a delta that no forward pass called.
        BadData: a batch has nothing to be learned.
        Diverged: a loss or gradient is no finite number; `out` has a checkpoint of the step before.
        OutOfMemory: not even one example at a time fits; likewise.
        Interrupted: Ctrl-C, or another process is gone; once a checkpoint has been written to `out`.

    Example:
        ```python
        feed = Feed(examples, tokenizer.pad_token_id, collate, order)
        for step in train.run(model, feed, Train(steps=100), name="reviews", out="out/reviews"):
            print(step.step, step.loss)
        lk.save(model, "reviews", "out/reviews")
        ```
    """
    loop = _loop(model, feed, settings, name)
    folder = None if out is None else RunFolder(Path(out), loop.identity(), loop.world)
    if folder is not None:
        folder.refuse_other_run(resume=resume)
    elif resume:
        raise LorakitError("resume=True needs the output folder of the run that is to go on; give out=")
    if loop.world.sharded:
        share_out(model)
    return _steps(loop, folder, evaluate)


def _steps(loop: _Loop, folder: RunFolder | None, evaluate: Evaluate | None) -> Steps:
    done = first = loop.begin(folder)
    plan = loop.feed.plan(loop.settings, done)
    try:
        stepper, seen = loop.stepper(), [] if folder is None else folder.evaluations()
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
        raise _resumable(loop, folder, done, "stopped") from interrupt
    except (Interrupted, RuntimeError) as error:
        if not isinstance(error, Interrupted) and not is_lost(error):
            raise
        if folder is None or not done:
            raise lost() from error
        raise _resumable(loop, folder, done, f"{lost()}: this one stopped") from error
    except (Diverged, OutOfMemory):
        if folder is not None and done:
            folder.write_alone(loop.checkpoint(done))  # as it was after the last good step
        raise
    finally:
        rest(loop.model, loop.name)


def _resumable(loop: _Loop, folder: RunFolder, done: int, stopped: str) -> Interrupted:
    path = folder.write_alone(loop.checkpoint(done))
    return Interrupted(f"{stopped} after step {done} of {loop.steps}; the checkpoint is {path}: run the same command "
                       "with --resume (resume=True in Python) to go on from it")  # fmt: skip


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
        loop.world.let_through(release)
        if evaluate is not None and _is_evaluated(step, loop.settings):
            found = loop.world.told(dict(evaluate()))
            step = replace(step, evaluation=found)
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
    step = folder.last()
    if evaluate is not None and step and not step.evaluation and _is_evaluated(step, loop.settings):
        folder.cut_back(step.step - 1)
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
    quick: Quick
    world: World

    def begin(self, folder: RunFolder | None) -> int:
        """Take up the newest checkpoint, if there is one, in all processes; gives the steps that are done."""
        found = None if folder is None else folder.begin()
        if self.world.size > 1:
            found = self.world.told(found or self.checkpoint(0))
        if found is None:
            return 0
        checkpoint.restore(found, self.trained, self.optimizer, adapter_buffers(self.model, self.name))
        return found.step

    def stepper(self) -> Stepper:
        """What takes the steps; the model is tried on the base, so that no delta counts as having acted."""
        with use(self.model, None), mode(self.model, training=False):
            loss = self._loss()
        given = self.model, self.feed, self.settings, self.name, self.trained, self.optimizer, self.quick
        return Stepper(*given, loss, Appetite(self.settings.forward_tokens), self.steps, self.world)

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
        free = (
            *("checkpoint_every", "evaluate_every", "patience"),
            *("forward_tokens", "checkpointing", "sharding"),  # where and in what parts the same is computed
            *("epochs", "max_length"),  # these act through steps and data
        )
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
    refuse_unable(model, settings)
    trained = trained_in(model, name)
    steps, optimizer = feed.steps(settings), optimizer_for(model, name, trained, settings)
    world = join(model, settings.sharding, lambda: plan_attached(model, name, feed.examples, settings).fits)
    with use(model, None), mode(model, training=False):
        quick = Quick.of(model, compile=settings.compile)  # before weights are shared out
    return _Loop(model, feed, settings, name, trained, steps, optimizer, quick, world)


def _refuse_untrained_head(model: Any, name: str) -> None:
    found = heads(model)
    adapted = {placement.path.split(".")[0] for placement in attached_to(model, name).plan}
    if found and not adapted.intersection(found):
        raise BadMethod(f"the adapter {name!r} leaves the classifier's head untrained; name it among the modules "
                        f"that the method trains whole: train=({found[-1]!r},)")  # fmt: skip
