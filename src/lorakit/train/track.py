"""A run in TensorBoard, MLflow, Weights & Biases or trackio: a wrapper around any iterator of steps.

`metrics.jsonl` is the record, and the service is asked how much of it it has. So a resumed run goes on in the same
tracked run, writes no step twice, and brings what a killed one had not sent yet.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lorakit.core.atomic import write_files
from lorakit.core.parsed import parsed
from lorakit.errors import LorakitError, MissingPackage, UnknownName, nearest
from lorakit.train import metrics
from lorakit.train.settings import Step

_log = logging.getLogger(__name__)
To = Literal["none", "tensorboard", "mlflow", "wandb", "trackio"]
TRACKED = "tracked.json"  # in the run's folder: what the run is called by each service
PROJECT = "lorakit"


@dataclass(frozen=True, slots=True)
class Tracked:
    """A run as a service has it."""

    id: str  # by which the service finds it again
    last: int  # the newest step that it has; below 1: none
    write: Callable[[int, Mapping[str, float]], object]  # a step's values
    finish: Callable[[bool], object]  # whether the run came to its end


Config = Mapping[str, Any]
Opening = Callable[[Path, Config, str | None], Tracked]  # of a run's folder, its settings and its id, if it has one


def track(steps: Iterator[Step], to: To, out: str | Path, config: Config | None = None) -> Generator[Step, None, None]:
    """Write the steps that pass through to a tracking service, as a run that has the name of the folder `out`.

    A service that fails on the way is left alone from there on, with a warning; training goes on.

    Args:
        steps: the steps of a run.
        to: the service; "none" only passes the steps on.
        out: the run's folder, where `metrics.jsonl` is.
        config: the run's settings, to be shown beside it.

    Raises:
        MissingPackage: the service's package is not installed.
        LorakitError: the service cannot be opened; before the first step.

    Example:
        ```python
        steps = train.run(model, feed, settings, out="out/reviews")
        for step in track(steps, "tensorboard", "out/reviews"):
            ...
        ```
    """
    if to == "none":
        yield from steps
        return
    run, done = _opened(to, Path(out), config or {}), False
    last: int | None = run.last
    try:
        for step in steps:
            last = None if last is None else _mirrored(to, run, last, step, Path(out))
            yield step
        done = True
    except KeyboardInterrupt as interrupt:  # handed on, so that the run writes its checkpoint
        if isinstance(steps, Generator):
            steps.throw(interrupt)
        raise
    except GeneratorExit:  # the caller wants no more
        done = True
        raise
    finally:
        _attempt(to, lambda: run.finish(done))


def require(to: To) -> None:
    """Refuse a tracking service whose package is not installed.

    Raises:
        MissingPackage: it is not.
        UnknownName: there is no such service.

    >>> require("none")
    """
    if to != "none" and to not in SERVICES:
        raise UnknownName(f"there is no tracking service {to!r}; {nearest(to, ['none', *SERVICES])}")
    if to != "none" and getattr(find_spec(to), "origin", None) is None:  # a mere folder of the name has none
        raise MissingPackage(f"tracking by {to} needs its package; pip install {to}")


def _opened(to: To, out: Path, config: Config) -> Tracked:
    require(to)
    known = _known(out / TRACKED)
    try:
        out.mkdir(parents=True, exist_ok=True)
        run = SERVICES[to](out, config, known.get(to))
    except Exception as error:  # whatever the service raises, it is the service's own
        raise LorakitError(f"{to} cannot be opened for the run {_name(out)!r}: {error}") from error
    if known.get(to) != run.id:
        write_files(out, {TRACKED: (json.dumps({**known, to: run.id}, indent=2) + "\n").encode()})
    return run


def _known(path: Path) -> Mapping[str, Any]:
    try:
        return parsed(path.read_bytes(), path, "the run is tracked as a new one") if path.exists() else {}
    except LorakitError as error:
        _log.warning("%s", error)
        return {}


def _mirrored(to: To, run: Tracked, last: int, step: Step, out: Path) -> int | None:
    """Write what the service lacks up to a step; gives its newest step, or None where it takes no more."""
    now = {**asdict(step), "tokens_per_second": step.tokens_per_second}
    gap = last + 1 < step.step and (out / metrics.METRICS).exists()
    earlier = [row for row in metrics.read(out) if last < row["step"] < step.step] if gap else []
    rows = [*earlier, now] if last < step.step else []
    if not _attempt(to, lambda: [run.write(row["step"], _values(row)) for row in rows]):
        return None
    return max(last, step.step)


def _attempt(to: To, action: Callable[[], object]) -> bool:
    try:
        action()
    except Exception as error:  # a service that fails must not take the run with it
        _log.warning("%s takes no more of this run (%s): training goes on, and metrics.jsonl has every step", to, error)
        return False
    return True


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
    evaluation = {f"evaluation/{key}": value for key, value in (row["evaluation"] or {}).items()}
    return {key: value for key, value in (numbers | evaluation).items() if key not in ("step", "steps")}


def _name(out: Path) -> str:
    return out.resolve().name


def _flat(config: Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and texts, as on the command line.

    >>> dict(_flat({"base": "b", "train": {"seed": 0}}))
    {'base': 'b', 'train.seed': '0'}
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _tensorboard(out: Path, config: Config, known: str | None) -> Tracked:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import FileWriter
    from torch.utils.tensorboard.summary import text

    events = EventAccumulator(str(out)).Reload()
    last = max((events.Scalars(tag)[-1].step for tag in events.Tags()["scalars"]), default=0)
    writer = FileWriter(str(out))
    if known is None:
        lines = [f"    {name} = {value}" for name, value in _flat(config)]  # indented: Markdown leaves it as it is
        writer.add_summary(text("run", "\n".join(lines)), 0)

    def write(step: int, values: Mapping[str, float]) -> None:  # a step is one record: it is there, or it is not
        writer.add_summary(Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]), step)

    return Tracked(_name(out), last, write, lambda done: writer.close())


def _mlflow(out: Path, config: Config, known: str | None) -> Tracked:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client, experiment = MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    if known is None:
        there = client.get_experiment_by_name(experiment)
        place = there.experiment_id if there else client.create_experiment(experiment)
        run = client.create_run(place, run_name=_name(out)).info.run_id
        client.log_batch(run, params=[Param(name, value) for name, value in _flat(config)])
    else:
        run = known
        client.update_run(run, "RUNNING")
    last = max((metric.step for metric in client.get_metric_history(run, "loss")), default=0)

    def write(step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        client.log_batch(run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    return Tracked(run, last, write, lambda done: client.set_terminated(run, "FINISHED" if done else "KILLED"))


def _wandb(out: Path, config: Config, known: str | None) -> Tracked:
    import wandb

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    run = wandb.init(project=project, name=_name(out), id=known, resume="allow", dir=out, config=dict(config),
                     reinit="create_new")  # fmt: skip
    return Tracked(
        run.id,
        run.step - 1,  # the step to come; offline it is 0, and the new part holds the whole run
        lambda step, values: run.log(dict(values), step=step, commit=True),
        lambda done: run.finish(exit_code=0 if done else 1),
    )


def _trackio(out: Path, config: Config, known: str | None) -> Tracked:
    import trackio

    def begun(resume: str) -> Any:
        return trackio.init(project=project, name=_name(out), config=dict(config), resume=resume, embed=False)

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    run = begun("allow" if known else "never")
    if known and run.id != known and run._next_step > 0:  # it finds runs by name, and this is another of the name
        run = begun("never")
    last = run._next_step - 1  # which no public name tells
    return Tracked(run.id, last, lambda step, values: run.log(dict(values), step=step), lambda done: run.finish())


SERVICES: Mapping[str, Opening] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
    "trackio": _trackio,
}
