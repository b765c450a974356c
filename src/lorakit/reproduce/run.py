"""A run: one declaration of base, method, data, training and evaluation, and what carrying it out leaves behind."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import torch

import lorakit as lk
from lorakit import models
from lorakit.core.atomic import write_files
from lorakit.core.files import TENSORS
from lorakit.core.kinds import require_one_stack
from lorakit.core.method import Method
from lorakit.core.statistics import Statistics
from lorakit.data import Data, Dataset, Encoded, Example, TooShort, collate, encode, encode_texts, open_data, order
from lorakit.errors import BadMethod
from lorakit.methods import DEFAULT
from lorakit.reproduce.calibration import gathered
from lorakit.reproduce.held_out import hold_out
from lorakit.reproduce.measures import Evaluate, classifies, compare, mean_loss
from lorakit.reproduce.place import differing, figures, refuse_place
from lorakit.train import Feed, Step, Train, draw, heads, run
from lorakit.train.best import best, evaluated, keep_best
from lorakit.train.distributed import here
from lorakit.train.forecast import Forecast
from lorakit.train.machine import usual_dtype
from lorakit.train.planner import plan_attached
from lorakit.train.settings import check
from lorakit.train.track import To, require, track
from lorakit.version import VERSION

_log = logging.getLogger(__name__)
RUN, RESULTS = "run.json", "results.json"
BEST = "best"  # folder of the adapter whose held-out loss is the lowest so far
LOSS = "held_out_loss"
PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
Wrap = Callable[[Iterator[Step]], Iterator[Step]]
Known = dict[Evaluate, Mapping[str, Any]]  # what a base measured, by the settings of the measurement
Keep = Literal["last", "best"]
Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides what a training run does; written beside its results."""

    base: str  # a packaged model, a folder, a GGUF file or a hub id
    data: Data  # what to learn
    out: str  # folder of the adapter and all that belongs to it
    method: Method = field(default_factory=DEFAULT)  # how to adapt
    train: Train = field(default_factory=Train)  # how to train
    evaluate: Evaluate = field(default_factory=Evaluate)  # what to measure before and after
    keep: Keep = "last"  # which state is saved: the last, or that of the lowest held-out loss
    quantise: models.Quantise = "none"  # keep the base's layers in 8 or 4 bits, or a GGUF file's as they are
    dtype: Dtype = "auto"  # of the base; auto: bfloat16 on a GPU, float32 on a CPU
    track: To = "none"  # a service that shows the run while it goes on, under the name of its folder
    calibrate_on: int = 256  # training examples for methods and initialisations that start from data

    def __post_init__(self) -> None:
        evaluates, patience = self.train.evaluate_every > 0, self.train.patience
        rules = [
            ("keep", self.keep, "last, or best", self.keep in get_args(Keep)),
            ("keep", self.keep, "last where train.evaluate_every is 0", self.keep != "best" or evaluates),
            ("train.patience", patience, "0 where train.evaluate_every is 0", not patience or evaluates),
        ]
        check("run with", rules)

    def to_json(self) -> dict[str, Any]:
        """The run as plain JSON values."""
        return asdict(self) | {"method": self.method.to_json()}


@dataclass(frozen=True)
class Outcome:
    """A finished run: the model with its adapter attached, the data, and the numbers."""

    model: Any
    tokenizer: Any
    data: Dataset
    name: str
    results: Mapping[str, Any]


def carry_out(run_: Run, *, resume: bool = False, wrap: Wrap = lambda steps: steps) -> Outcome:
    """Load base and data, and take all steps of `adapting`.

    Args:
        run_: the declaration.
        resume: go on from the newest checkpoint in `out`.
        wrap: put around the steps, e.g. `train.show` for a progress display.

    Raises:
        LorakitError: anything in the declaration that cannot be done; nothing is half-written.
    """
    require(run_.track)
    refuse_place(run_.out, resume=resume)
    return finished(adapting(*prepare(run_), run_, resume=resume, wrap=wrap))


@dataclass(frozen=True)
class Ready:
    """A run before its first step: the model with the new adapter attached, and what it will read."""

    model: Any
    tokenizer: Any
    name: str
    examples: Feed
    held_out: list[Encoded]


def ready(model: Any, tokenizer: Any, data: Dataset, run_: Run) -> Ready:
    """Attach the adapter, and put the training examples together; nothing is written.

    Raises:
        LorakitError: anything in the declaration that cannot be done.
    """
    require_one_stack(model)
    name = Path(run_.out).resolve().name
    torch.manual_seed(run_.train.seed)
    method = with_head(model, run_.method)
    train, held = hold_out(data.train, run_.evaluate.held_out) if run_.train.evaluate_every else (data.train, [])
    examples = feed(model, tokenizer, replace(data, train=train), run_.train, method)
    held_out = encoded(model, tokenizer, held, run_.train, method)
    lk.attach(model, method, name, statistics=_statistics(model, method, examples, run_))
    return Ready(model, tokenizer, name, examples, held_out)


def forecast(made: Ready, run_: Run) -> Forecast:
    """What the run is going to take here."""
    return plan_attached(made.model, made.name, made.examples.examples, run_.train)


def fitted(made: Ready, run_: Run) -> Train:
    """The settings; with shorter passes, or blocks computed again, where memory does not suffice.

    What more devices would have to share is left as it is, and that is said.
    """
    choice, longest = forecast(made, run_).choice, max(len(example.ids) for example in made.examples.examples)
    settings = run_.train
    passes = min(settings.forward_tokens, settings.batch_size * longest)
    is_cut = choice.checkpointing != settings.checkpointing or choice.forward_tokens < passes
    if is_cut or not 1 <= choice.devices <= here().size:
        _log.warning(choice.why)
    chosen = replace(settings, checkpointing=choice.checkpointing, forward_tokens=max(choice.forward_tokens, 1))
    return chosen if is_cut else settings


def adapting(
    model: Any,
    tokenizer: Any,
    data: Dataset,
    run_: Run,
    *,
    resume: bool = False,
    wrap: Wrap = lambda steps: steps,
    known: Known | None = None,
) -> Generator[Step, None, Outcome]:
    """Attach, measure, train, save adapter and loss curve in `out`, measure again and write the results there.

    One step at a time, so that several runs can take turns; `finished` takes all. Where the data has no test examples,
    nothing is measured; what the base measures is noted in `known`. A finished run that is resumed keeps its results.
    Of several processes all train and measure, and the first writes.
    """
    known = {} if known is None else known
    made, out, world = ready(model, tokenizer, data, run_), Path(run_.out), here()
    settings, evaluate = world.told(fitted(made, run_)), _evaluation(made, run_)
    steps = run(model, made.examples, settings, name=made.name, out=out, resume=resume, evaluate=evaluate)
    results = world.told(_results_in(run_)) if resume else None
    if data.test and not results and run_.evaluate not in known:
        known[run_.evaluate] = compare(model, tokenizer, data, run_.evaluate, {"base": None})
    tracked = track(steps, "none" if results else run_.track, out, run_.to_json())
    yield from wrap(tracked) if world.is_first else steps
    if run_.keep == "best" and world.told((out / BEST / TENSORS).is_file()):
        _replace(made, out / BEST)
    if not results:
        if world.is_first:
            lk.save(model, made.name, out)
            write_files(out, {RUN: as_json({"run": run_.to_json(), "versions": versions()})})
            draw(out)
        after = compare(model, tokenizer, data, run_.evaluate, {"adapter": made.name}) if data.test else {}
        measured = {**known.get(run_.evaluate, {}), **after}
        results = world.told(_concluded(made, run_, measured) if world.is_first else {})
    return Outcome(model, tokenizer, data, made.name, results)


def finished(steps: Generator[Step, None, Outcome]) -> Outcome:
    """Take all steps of a run; gives what came of it."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast(Outcome, end.value)


def _concluded(made: Ready, run_: Run, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Write the results."""
    out = Path(run_.out)
    results = {**measured, **figures(made.model, made.name, out), **_kept(run_, out)}
    write_files(out, {RESULTS: as_json(results)})
    return results


def _evaluation(made: Ready, run_: Run) -> Callable[[], Mapping[str, float]] | None:
    """What is called every `evaluate_every` steps."""
    if not made.held_out:
        return None

    def evaluate() -> dict[str, float]:
        with lk.use(made.model, made.name):
            batch = run_.evaluate.batch_size
            return {LOSS: mean_loss(made.model, made.held_out, made.tokenizer.pad_token_id, batch)}

    def save() -> None:
        if here().is_first:
            lk.save(made.model, made.name, Path(run_.out) / BEST)

    return evaluate if run_.keep == "last" else keep_best(evaluate, save, run_.out)


def _replace(made: Ready, folder: Path) -> None:
    """Give the attached adapter the values of the one in `folder`."""
    lk.detach(made.model, made.name)
    lk.load(made.model, folder, made.name, trainable=True)


def _kept(run_: Run, out: Path) -> dict[str, Any]:
    """Which step's state was saved, and its held-out loss; nothing where none was evaluated."""
    losses = evaluated(out)
    kept = (best(losses) if run_.keep == "best" else losses[-1]) if losses else None
    return {"kept_step": kept.step, LOSS: kept.value} if kept else {}


def _statistics(model: Any, method: Method, examples: Feed, run_: Run) -> Statistics | None:
    if not method.needs():
        return None
    return gathered(model, method.sites(model), method.needs(), examples, run_.train, run_.calibrate_on)


def _results_in(run_: Run) -> dict[str, Any] | None:
    """The results of a run that came to its end; None where it did not, or where what it left is damaged."""
    out, now = Path(run_.out), json.loads(as_json(run_.to_json()))
    try:
        found, told = (json.loads((out / name).read_bytes()) for name in (RESULTS, RUN))
        late = list(differing(told["run"] | {"out": run_.out}, now))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(found, dict) or not (out / TENSORS).is_file():
        return None
    if late:
        _log.warning("%s holds a finished run, whose results stay as they are; not applied: %s", out, ", ".join(late))
    return found


class Declared(Protocol):
    """What decides on model and data."""

    @property
    def base(self) -> str: ...
    @property
    def data(self) -> Data: ...
    @property
    def quantise(self) -> models.Quantise: ...
    @property
    def dtype(self) -> Dtype: ...
    @property
    def train(self) -> Train: ...


def prepare(run_: Declared) -> tuple[Any, Any, Dataset]:
    """The base, its tokenizer and the data; a base that writes no text gets a classification head for the labels."""
    dtype = dtype_of(run_.dtype)
    if models.writes(run_.base):
        model, tokenizer = models.load(run_.base, dtype=dtype, quantise=run_.quantise)
        return at_hand(model), tokenizer, open_data(run_.data, tokenizer)
    data = open_data(run_.data)
    if not data.labels:
        raise BadMethod(f"{run_.base} writes no text, so it can only classify; give data with a label column")
    labels, seed = len(data.labels), run_.train.seed
    model, tokenizer = models.load(run_.base, dtype=dtype, quantise=run_.quantise, labels=labels, seed=seed)
    return at_hand(model), tokenizer, data


def dtype_of(dtype: Dtype) -> torch.dtype:
    """The type of the base's numbers; what is usual here, where it is not told."""
    told: torch.dtype = usual_dtype(None) if dtype == "auto" else getattr(torch, dtype)
    return told


def at_hand(model: Any) -> Any:
    """The model, on a GPU where there is one; of several processes each decides when it joins the others."""
    return model.to("cuda") if torch.cuda.is_available() and here().size == 1 else model


def with_head(model: Any, method: Method) -> Method:
    """The method, training the model's classification head too where there is one and nothing else is said."""
    told = asdict(method).get("train")
    if not classifies(model) or told is None or told:
        return method
    return replace(method, **{"train": tuple(heads(model))})


def feed(model: Any, tokenizer: Any, data: Dataset, settings: Train, method: Method | None = None) -> Feed:
    """The training examples as token ids, in batches; `encoded` says what is refused."""
    examples = encoded(model, tokenizer, data.train, settings, method)
    return Feed(examples, tokenizer.pad_token_id, collate, order)


def encoded(
    model: Any, tokenizer: Any, examples: list[Example], settings: Train, method: Method | None = None
) -> list[Encoded]:
    """Examples as token ids; positions stay free for what the method is going to insert.

    Raises:
        BadMethod: it leaves too few of them for any example.
        BadData: examples that cannot be learned from.
    """
    to_ids = encode_texts if classifies(model) else encode
    prefix, infix = method.inserts if method else (0, 0)
    longest = models.longest(model)
    left = max(longest - prefix - infix, 0)
    try:
        return to_ids(examples, tokenizer, min(settings.max_length, max(left, 1)))
    except TooShort as error:
        if not method or left == longest or error.least > min(longest, settings.max_length):
            raise
        raise BadMethod(
            f"{method.name} puts {prefix + infix} places into the sequence (prefix={prefix}, infix={infix}), but "
            f"{type(model).__name__} has {longest} positions in all, which leaves {left or 'none'} for an example; it "
            f"needs {error.least} or more, so take a shorter prefix"
        ) from error


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    installed = {name: metadata.version(name) for name in PACKAGES}
    return {"lorakit": VERSION, "python": platform.python_version(), **installed}


def as_json(value: Any) -> bytes:
    """Readable JSON bytes."""
    return (json.dumps(value, indent=2) + "\n").encode()
