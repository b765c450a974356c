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
from lorakit.errors import LorakitError, OutputExists, UnknownName, nearest
from lorakit.reproduce.run import LOSS, RESULTS, RUN, Known, Run, adapting, as_json, prepare, versions
from lorakit.train import Step
from lorakit.train.loop import Steps
from lorakit.train.settings import check, counts
from lorakit.train.together import in_turn, view
from lorakit.train.track import require

SWEEP = "sweep.json"
COSTS = re.compile(r"perplexity|.*(loss|seconds|bytes|parameters)")  # numbers of which less is better
OWN = ("out", "method", "train", "evaluate", "keep", "track", "calibrate_on")  # have no part in base and data
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
        OutputExists: the folder holds a sweep, and it is not to be resumed.
        UnknownName: the results have no number of the name `by`; all runs are done.
        LorakitError: a declaration that is refused; before anything is trained.
        Interrupted: Ctrl-C, once each run that had begun has its checkpoint.
    """
    out, values = Path(sweep.out), sweep.combinations()
    if (out / SWEEP).exists() and not resume:
        raise OutputExists(f"{out} holds another sweep; resume that one (--resume), or choose another folder")
    runs = {name: replace(declare(own), out=str(out / name)) for name, own in values.items()}
    for service in {run_.track for run_ in runs.values()}:
        require(service)
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
            failed |= yield from trained(group, sweep.at_once, resume=resume)
        return
    from lorakit.reproduce._sweep_ray import on_ray

    for errors in on_ray(groups, sweep.at_once):
        failed |= errors


def trained(runs: Runs, at_once: int, *, resume: bool) -> Generator[tuple[str, Step], None, Failed]:
    """Carry out runs that share one base, so many at once, one step of each in turn; gives those that failed."""
    try:
        model, tokenizer, data = prepare(next(iter(runs.values())))
    except Exception as error:
        return dict.fromkeys(runs, _sentence(error))
    known: Known = {}

    def one(run_: Run) -> Steps:
        again = resume and Path(run_.out).exists()
        yield from adapting(view(model), tokenizer, data, run_, resume=again, known=known)

    raised = yield from in_turn({name: one(run_) for name, run_ in runs.items()}, at_once)
    failed = {name: _sentence(error) for name, error in raised.items()}
    stale = [name for name, run_ in runs.items() if name not in failed and results_of(run_) is None]
    return failed | dict.fromkeys(stale, "its folder holds the results of other settings; remove it to run these")


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, LorakitError) else f"{type(error).__name__}: {error}"


def results_of(run_: Run) -> Values | None:
    """The results in a run's folder; None where it has not come to its end, or was another run."""
    try:
        told, results = (json.loads((Path(run_.out) / name).read_bytes()) for name in (RUN, RESULTS))
        same = _agrees(told["run"] | {"out": run_.out}, json.loads(as_json(run_.to_json())))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return results if same else None


def _agrees(told: Any, now: Any) -> bool:
    """Whether all that a file tells is so; what it does not tell yet may be anything.

    >>> _agrees({"train": {"steps": 3}}, {"train": {"steps": 3, "new": 0}}), _agrees({"rank": 8}, {"rank": 4})
    (True, False)
    """
    if isinstance(told, dict) and isinstance(now, dict):
        return all(key in now and _agrees(value, now[key]) for key, value in told.items())
    return bool(told == now)


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
