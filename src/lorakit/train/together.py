"""Several adapters trained on one base at once: one step of each in turn, to the bits of as many separate runs.

Each run has a view of the model: modules and hooks of its own over the base's own tensors. So a run meets no other's
adapter, and all of them together hold the weights once and the activations of one step.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lorakit.core.attach import detach
from lorakit.core.insertion import is_watched
from lorakit.core.route import key_of
from lorakit.core.routing import hook, unhook
from lorakit.core.state import adapters_of, attached_to, state_of
from lorakit.errors import Interrupted, LorakitError, OutputExists
from lorakit.train.feed import Feed
from lorakit.train.loop import Evaluate, Steps, run
from lorakit.train.settings import Step, Train
from lorakit.train.surroundings import held_interrupt

_log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
Failures = dict[str, Exception]
_TOLD = 8  # failures in one sentence; the error's cause has all


@dataclass(frozen=True, slots=True)
class Part:
    """One of several runs: what it reads, how it trains, and the other arguments of `run`."""

    feed: Feed
    settings: Train
    out: str | Path | None = None
    resume: bool = False
    evaluate: Evaluate | None = None


def together(model: Any, parts: Mapping[str, Part]) -> Generator[tuple[str, Step], None, None]:
    """Train several adapters of one model, one step of each in turn; each ends with the bits of a run of its own.

    Data, settings, number of steps and folder may differ. A run that fails ends there and the others go on; its
    sentence is logged at once and raised at the end. Ctrl-C ends all of them, after a checkpoint of each.

    Args:
        model: a transformers model with attached, trainable adapters.
        parts: what to do for each of them, by name.

    Raises:
        OutputExists: two parts have the same folder, or one that holds another run; before anything is trained.
        LorakitError: at the end, where runs have failed: which, and why.
        Interrupted: Ctrl-C, once each run with a folder has its checkpoint.

    Example:
        ```python
        for seed in range(3):
            lk.attach(model, lk.LoRA(rank=8), name=f"seed-{seed}")
        parts = {f"seed-{seed}": Part(feed, Train(steps=100, seed=seed)) for seed in range(3)}
        for name, step in together(model, parts):
            print(name, step.step, step.loss)
        ```
    """
    _refuse_shared_folders(parts)
    return _raising({name: _begun(model, name, part) for name, part in parts.items()})


def _begun(model: Any, name: str, part: Part) -> Steps:
    given = {"out": part.out, "resume": part.resume, "evaluate": part.evaluate}
    return run(_alone(model, name), part.feed, part.settings, name=name, **given)  # type: ignore[arg-type]


def _raising(runs: Mapping[str, Steps]) -> Generator[tuple[str, Step], None, None]:
    failed: Failures = {}
    yield from in_turn(runs, failed)
    if failed:
        raise failure(failed, len(runs))


def failure(failed: Failures, count: int) -> LorakitError:
    """One error for all of `count` runs that failed; its cause has theirs."""
    told = "; ".join(f"{name}: {error}" for name, error in itertools.islice(failed.items(), _TOLD))
    told += f"; and {len(failed) - _TOLD} more" if len(failed) > _TOLD else ""
    error = LorakitError(f"{len(failed)} of {count} runs failed, the others came to their end: {told}")
    error.__cause__ = ExceptionGroup("what the runs raised", list(failed.values()))
    return error


def in_turn(
    runs: Mapping[str, Steps], failed: Failures, at_once: int | None = None
) -> Generator[tuple[str, Step], None, None]:
    """One step of each of several runs after another, until the last has ended.

    Args:
        runs: generators of steps, by name.
        failed: is given what they raise, by name, as soon as they do.
        at_once: how many of them may be going on; the next begins where one has ended. None: all.

    Raises:
        Interrupted: Ctrl-C, once each run with a folder has its checkpoint.
    """
    waiting, going = iter(runs.items()), dict[str, Steps]()
    try:
        while going := going | dict(itertools.islice(waiting, (at_once or len(runs)) - len(going))):
            for name, steps in list(going.items()):
                step = _next(name, steps, failed)
                if step is None:
                    del going[name]
                else:
                    yield name, step
    except (KeyboardInterrupt, Interrupted) as interrupt:
        raise _stopped(going, interrupt) from interrupt
    finally:
        for steps in going.values():
            steps.close()


def _next(name: str, steps: Steps, failed: Failures) -> Step | None:
    """The next step; None where there is none."""
    try:
        return next(steps, None)
    except Interrupted:
        raise
    except Exception as error:  # whatever it is, the other runs have no part in it
        _log.warning("%s fails, the others go on: %s", name, error)
        failed[name] = error
        return None


def _stopped(going: Mapping[str, Steps], interrupt: BaseException) -> BaseException:
    """Let each run write its checkpoint; gives what is to be raised."""
    raised = [interrupt]
    with held_interrupt():
        for steps in going.values():
            try:
                steps.throw(KeyboardInterrupt())
            except (KeyboardInterrupt, Exception) as error:  # a run without a folder hands it back
                raised.append(error)
    saved = sum(isinstance(error, Interrupted) for error in raised)
    faults = [str(error) for error in raised if not isinstance(error, KeyboardInterrupt | Interrupted)]
    if not saved and not faults:
        return KeyboardInterrupt()
    return Interrupted("; ".join([f"stopped, and {saved} runs have a checkpoint in their folders: run the same command "
                                  "with --resume (resume=True in Python) to go on from there", *faults]))  # fmt: skip


def view(model: Model) -> Model:
    """Another model object over the same tensors: what is attached to one is not attached to the other.

    >>> layer = nn.Linear(2, 2)
    >>> view(layer) is layer, view(layer).weight is layer.weight
    (False, True)
    """
    return copy.deepcopy(model, _tensors(model))


def _tensors(model: nn.Module) -> dict[int, Any]:
    """What a copy shares with the model, as `copy.deepcopy` wants to know it."""
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}


def _alone(model: Model, name: str) -> Model:
    """A view of the model with one of its adapters, as if there were no other."""
    attached_to(model, name)
    others = [other for other in state_of(model).attached if other != name]
    shared = _tensors(model) | {id(record): record for record in state_of(model).attached.values()}
    for _, _, adapters in adapters_of(model):
        left_out = (adapters._modules.get(key_of(other)) for other in others)
        shared |= {id(deltas): nn.ModuleDict() for deltas in left_out if deltas is not None}
    found = copy.deepcopy(model, shared)
    for other in others:
        detach(found, other)
    for _, module, adapters in adapters_of(found):
        if adapters._modules and not is_watched(module):
            unhook([module])  # some of its hooks may have been the others'
            hook(module)
    return found


def _refuse_shared_folders(parts: Mapping[str, Part]) -> None:
    places = Counter(Path(part.out).resolve() for part in parts.values() if part.out is not None)
    shared = [str(place) for place, count in places.items() if count > 1]
    if shared:
        raise OutputExists(f"several runs have the folder {', '.join(shared)}; give each one of its own")
