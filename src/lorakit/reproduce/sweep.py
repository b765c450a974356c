"""A sweep: runs that differ in some values, trained together where they share base and data."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lorakit import models
from lorakit.core.atomic import write_files
from lorakit.core.parsed import parsed
from lorakit.errors import LorakitError, OutputExists, UnknownName, nearest
from lorakit.reproduce._sweep_ray import imported, on_ray
from lorakit.reproduce.place import refuse_place
from lorakit.reproduce.run import LOSS, RESULTS, RUN, Known, Run, adapting, as_json, prepare, versions
from lorakit.train import Step
from lorakit.train.folder import apart, marks
from lorakit.train.loop import Steps
from lorakit.train.settings import check, counts
from lorakit.train.together import Failures, in_turn, view
from lorakit.train.track import require

SWEEP = "sweep.json"
COSTS = re.compile(r"perplexity|.*(loss|seconds|bytes|parameters)")  # numbers of which less is better
OWN = ("out", "method", "train", "evaluate", "keep", "track", "calibrate_on")  # have no part in base and data
# what decides on no result
FREE = ("out", "track", "train.checkpoint_every", "train.forward_tokens", "train.checkpointing", "train.sharding")
_PLAIN = re.compile(r"[\w.+-]{1,32}")

Values = Mapping[str, Any]
Runs = dict[str, Run]
Failed = dict[str, str]  # the sentence of each run that failed, by name
Turns = Iterator[tuple[str, Step]]
Wrap = Callable[[Turns], Turns]


@dataclass(frozen=True, kw_only=True)
class Sweep(Run):
    """A run, and what varies in it; each combination of the values is a run of its own."""

    out: str  # folder of the sweep; each run has one of its own in it
    sweep: Mapping[str, Any] = field(default_factory=dict)  # lists of values by name, as {"method.rank": [4, 8]}
    pick: int | None = None  # how many of the combinations, drawn at random; None: all of them
    pick_seed: int = 0  # governs which are drawn
    at_once: int = 8  # adapters that are trained on one base at once
    by: str | None = None  # number of the results that sorts the runs; None: held_out_loss, a measure, or the loss
    on: Literal["here", "ray"] = "here"  # this machine, or a Ray cluster whose machines share `out`

    def __post_init__(self) -> None:
        super().__post_init__()
        check("sweep with", counts(at_once=self.at_once, **({} if self.pick is None else {"pick": self.pick})))

    def combinations(self) -> dict[str, Values]:
        """The values of each run, by its name.

        Raises:
            LorakitError: nothing varies, or something is no list of different values.
        """
        over = dict(_lists(self.sweep))
        if not over:
            raise LorakitError(
                'nothing varies in this sweep; give values, as in the table [sweep]: "method.rank" = [4, 8]'
            )
        found = [dict(zip(over, values, strict=True)) for values in itertools.product(*over.values())]
        if self.pick is not None and self.pick < len(found):
            chosen = random.Random(self.pick_seed).sample(range(len(found)), self.pick)
            found = [found[number] for number in sorted(chosen)]
        return {_name(values, over): values for values in found}


def _lists(told: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The lists by their dotted names, which TOML has as tables where they are not in quotes."""
    for key, value in told.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _lists(value, f"{name}.")
        elif name == "out":
            raise LorakitError("sweep: out cannot vary, since each run has a folder in that of the sweep; leave it out")
        elif not isinstance(value, list | tuple) or not value:
            raise LorakitError(f"sweep: {name} must be a list of values, not {value!r}")
        elif len({_text(each, value) for each in value}) < len(value):
            raise LorakitError(f"sweep: {name} has a value twice: {value}")
        else:
            yield name, list(value)


def _name(values: Values, over: Mapping[str, Sequence[Any]]) -> str:
    """What a run and its folder are called.

    >>> _name({"method.rank": 8, "train.seed": 1}, {"method.rank": [4, 8], "train.seed": [0, 1]})
    'rank=8,seed=1'
    """
    short = shortened(over)
    return ",".join(f"{short[key]}={_text(value, over[key])}" for key, value in values.items())


def shortened(keys: Collection[str]) -> dict[str, str]:
    """Dotted names by their last parts, where these differ.

    >>> shortened(["method.rank", "train.seed", "data.seed"])
    {'method.rank': 'rank', 'train.seed': 'train.seed', 'data.seed': 'data.seed'}
    """
    lasts = Counter(key.rpartition(".")[2] for key in keys)
    return {key: last if lasts[last := key.rpartition(".")[2]] == 1 else key for key in keys}


def _text(value: Any, among: Sequence[Any]) -> str:
    """A value as a part of a folder's name: as it is written, or its number in the list."""
    return text if _PLAIN.fullmatch(text := str(value)) else f"no{among.index(value) + 1}"


@dataclass(frozen=True)
class Row:
    """One run of a sweep: what it has of its own, and its results, or why there are none."""

    name: str
    values: Values
    results: Values | None = None
    error: str = ""

    def number(self, by: str) -> float | None:
        """One of its results, or of the adapter's measures."""
        found = _flat(self.results).get(by)
        return found if isinstance(found, int | float) else None


def _flat(results: Values | None) -> Values:
    """The results, with the adapter's measures beside the others."""
    return {**results, **results.get("adapter", {})} if results else {}


@dataclass(frozen=True)
class Table:
    """The runs of a sweep, best first; those without results come last."""

    rows: list[Row]
    by: str  # what sorts them


def carry_out(
    sweep: Sweep,
    declare: Callable[[Values], Run],
    *,
    resume: bool = False,
    wrap: Wrap = lambda turns: turns,
) -> Table:
    """Carry out all runs of a sweep; each leaves in its folder what it would leave by itself, and fails by itself.

    Args:
        sweep: what varies, where it goes and how.
        declare: gives the run that has these values.
        resume: leave finished runs as they are, and go on with the others.
        wrap: put around the steps of all runs, to show them.

    Raises:
        OutputExists: the folder holds a sweep that is not to be resumed, results of other settings, or a run.
        MissingPackage: that of a cluster or a tracking service is not installed.
        UnknownName: the results have no number of the name `by`; all runs are done.
        LorakitError: a declaration that is refused; before anything is trained.
        Interrupted: Ctrl-C, once each run that had begun has its checkpoint.
    """
    out, values = Path(sweep.out), sweep.combinations()
    refuse_place(sweep.out, resume=True)  # it may hold a sweep
    if found := marks(out):
        raise OutputExists(f"{out} holds a run (it has {', '.join(found)}); choose another folder for the sweep")
    if (out / SWEEP).exists() and not resume:
        raise OutputExists(f"{out} holds another sweep; resume that one (--resume), or choose another folder")
    runs = {name: replace(declare(own), out=str(out / name)) for name, own in values.items()}
    for service in {run_.track for run_ in runs.values()}:
        require(service)
    if sweep.on == "ray":
        imported()
    _refuse_to_lose_results(out, runs, values)
    groups = sharing({name: run_ for name, run_ in runs.items() if results_of(run_) is None})
    failed: Failed = {}
    turns = _turns(groups, sweep, failed, resume=resume)
    try:
        _write(sweep, tabled(runs, values, failed, sweep.by))
        for _ in wrap(turns):
            pass
    except KeyboardInterrupt as interrupt:  # in what shows the steps
        turns.throw(interrupt)
        raise
    finally:
        table = tabled(runs, values, failed, sweep.by)
        _write(sweep, table)
    _refuse_unknown(table)
    return table


def sharing(runs: Runs) -> list[Runs]:
    """The runs in groups that can share one base: a fresh classification head depends on the seed."""
    writes, found = cache(models.writes), dict[Any, Runs]()
    for name, run_ in runs.items():
        common = tuple(getattr(run_, each.name) for each in fields(Run) if each.name not in OWN)
        seed = None if writes(run_.base) else run_.train.seed
        found.setdefault((common, seed), {})[name] = run_
    return list(found.values())


def _turns(
    groups: list[Runs], sweep: Sweep, failed: Failed, *, resume: bool
) -> Generator[tuple[str, Step], None, None]:
    if sweep.on == "here":
        for group in groups:
            yield from trained(group, sweep.at_once, failed, resume=resume)
        return
    for errors in on_ray(groups, sweep.at_once):
        failed |= errors


def trained(runs: Runs, at_once: int, failed: Failed, *, resume: bool) -> Generator[tuple[str, Step], None, None]:
    """Carry out runs that share one base, so many at once, one step of each in turn; `failed` is given what fails."""
    try:
        model, tokenizer, data = prepare(next(iter(runs.values())))
    except Exception as error:
        failed |= dict.fromkeys(runs, _sentence(error))
        return
    known, raised = Known(), Failures()

    def one(run_: Run) -> Steps:
        again = resume and Path(run_.out).exists()
        yield from adapting(view(model), tokenizer, data, run_, resume=again, known=known)

    try:
        yield from in_turn({name: one(run_) for name, run_ in runs.items()}, raised, at_once)
    finally:
        failed |= {name: _sentence(error) for name, error in raised.items()}


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, LorakitError) else f"{type(error).__name__}: {error}"


def results_of(run_: Run) -> Values | None:
    """The results in a run's folder; None where it has not come to its end."""
    path = Path(run_.out) / RESULTS
    try:
        return parsed(path.read_bytes(), path, "")
    except (OSError, LorakitError):
        return None


def _refuse_to_lose_results(out: Path, runs: Runs, values: Mapping[str, Values]) -> None:
    """Refuse where results that are there would be none of this sweep."""
    for run_ in runs.values():
        if results_of(run_) is not None and (different := list(_different(_told(run_), _plain(run_.to_json())))):
            raise OutputExists(f"{run_.out} holds results of other settings: {'; '.join(different)}; resume with the "
                               "same settings, or choose another folder for the sweep")  # fmt: skip
    path, now = out / SWEEP, _plain(values)
    rows = parsed(path.read_bytes(), path, "remove it").get("runs", []) if path.exists() else []
    gone = [row["name"] for row in rows if row["results"] and now.get(row["name"]) != row["values"]]
    if gone:
        raise OutputExists(f"{out} has results of runs that are not in this sweep ({', '.join(gone)}); add their "
                           "values to it, or choose another folder")  # fmt: skip


def _told(run_: Run) -> Values:
    """The run that has ended in a run's folder."""
    path = Path(run_.out) / RUN
    content = path.read_bytes() if path.exists() else b""
    return dict(parsed(content, path, "remove its folder to run it again").get("run", {}))


def _plain(value: Any) -> Any:
    """As it reads when it comes back from a file."""
    return json.loads(as_json(value))


def _different(told: Values, now: Values, prefix: str = "") -> Iterator[str]:
    """In what a run differs from what a file tells of it; what the file does not tell yet may be anything.

    >>> list(_different({"train": {"steps": 3, "seed": 0}}, {"train": {"steps": 6, "seed": 0, "new": 1}}))
    ['train.steps is 3 there and 6 here']
    """
    for key, value in told.items():
        name, other = f"{prefix}{key}", now.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from _different(value, other, f"{name}.")
        elif value != other and name not in FREE:
            yield apart(name, value, other)


def tabled(runs: Runs, values: Mapping[str, Values], failed: Failed, by: str | None) -> Table:
    """What the runs' folders hold now, best first."""
    rows = [Row(name, values[name], results_of(run_), failed.get(name, "")) for name, run_ in runs.items()]
    by = by or _usual(rows)
    sign = 1 if COSTS.fullmatch(by) else -1

    def place(row: Row) -> float:
        value = row.number(by)
        return math.inf if value is None or math.isnan(value) else sign * value

    return Table(sorted(rows, key=place), by)


def _usual(rows: Sequence[Row]) -> str:
    """What sorts a sweep where nothing is said: what was held out of training comes before what is left for tests."""
    results = next((row.results for row in rows if row.results), {})
    return LOSS if LOSS in results else next(iter(results.get("adapter", {})), "loss")


def _refuse_unknown(table: Table) -> None:
    ended = [row for row in table.rows if row.results]
    if ended and all(row.number(table.by) is None for row in ended):
        have = [name for name in _flat(ended[0].results) if ended[0].number(name) is not None]
        raise UnknownName(
            f"the runs are done, but their results have no {table.by!r} to sort them by; {nearest(table.by, have)}"
        )


def _write(sweep: Sweep, table: Table) -> None:
    told = {"by": table.by, "runs": [asdict(row) for row in table.rows], "versions": versions()}
    write_files(Path(sweep.out), {SWEEP: as_json({"sweep": sweep.to_json(), **told})})
