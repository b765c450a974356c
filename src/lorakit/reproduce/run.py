"""A run: one declaration of base, method, data, training and evaluation, and what carrying it out leaves behind."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import lorakit as lk
from lorakit import models
from lorakit.core.atomic import write_files
from lorakit.core.method import Method
from lorakit.data import Data, Dataset, collate, encode, encode_texts, open_data, order
from lorakit.errors import BadMethod
from lorakit.methods import DEFAULT
from lorakit.reproduce.measures import Evaluate, classifies, compare
from lorakit.train import Feed, Step, Train, draw, run
from lorakit.version import VERSION

RUN, RESULTS = "run.json", "results.json"
PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
Wrap = Callable[[Iterator[Step]], Iterator[Step]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides what a training run does; written beside its results."""

    base: str  # a packaged model, a folder, a GGUF file or a hub id
    data: Data  # what to learn
    out: str  # folder of the adapter and all that belongs to it
    method: Method = field(default_factory=DEFAULT)  # how to adapt
    train: Train = field(default_factory=Train)  # how to train
    evaluate: Evaluate = field(default_factory=Evaluate)  # what to measure before and after

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
    """Load base and data, and `adapt`.

    Args:
        run_: the declaration.
        resume: go on from the newest checkpoint in `out`.
        wrap: put around the steps, e.g. `train.show` for a progress display.

    Raises:
        LorakitError: anything in the declaration that cannot be done; nothing is half-written.
    """
    return adapt(*prepare(run_), run_, resume=resume, wrap=wrap)


def adapt(
    model: Any,
    tokenizer: Any,
    data: Dataset,
    run_: Run,
    *,
    resume: bool = False,
    wrap: Wrap = lambda steps: steps,
) -> Outcome:
    """Attach, measure, train, measure again, and save adapter, metrics, loss curve and results in `out`.

    Where the data has no test examples, nothing is measured.
    """
    out, name = Path(run_.out), Path(run_.out).name
    torch.manual_seed(run_.train.seed)
    lk.attach(model, with_head(model, run_.method), name)
    steps = run(model, feed(model, tokenizer, data, run_.train), run_.train, name=name, out=out, resume=resume)
    before = compare(model, tokenizer, data, run_.evaluate, {"base": None}) if data.test else {}
    taken = list(wrap(steps))
    after = compare(model, tokenizer, data, run_.evaluate, {"adapter": name}) if data.test else {}
    lk.save(model, name, out)
    draw(out)
    results = before | after | figures(model, name, out, taken)
    write_files(out, {RUN: as_json({"run": run_.to_json(), "versions": versions()}), RESULTS: as_json(results)})
    return Outcome(model, tokenizer, data, name, results)


def prepare(run_: Run) -> tuple[Any, Any, Dataset]:
    """The base, its tokenizer and the data; a base that writes no text gets a classification head for the labels."""
    labels = None
    if not models.writes(run_.base):
        labels = len(open_data(run_.data).labels) or None
        if labels is None:
            raise BadMethod(f"{run_.base} writes no text, so it can only classify; give data with a label column")
    model, tokenizer = models.load(run_.base, labels=labels, seed=run_.train.seed)
    return model, tokenizer, open_data(run_.data, tokenizer)


def with_head(model: Any, method: Method) -> Method:
    """The method, training the model's classification head too where there is one and nothing else is said."""
    told = asdict(method).get("train")
    if not classifies(model) or told is None or told:
        return method
    others = [(name, child) for name, child in model.named_children() if child is not model.base_model]
    heads = [name for name, child in others if next(child.parameters(), None) is not None]
    return replace(method, **{"train": tuple(heads)})


def feed(model: Any, tokenizer: Any, data: Dataset, settings: Train) -> Feed:
    """The training examples as token ids, in batches."""
    to_ids = encode_texts if classifies(model) else encode
    return Feed(to_ids(data.train, tokenizer, settings.max_length), tokenizer.pad_token_id, collate, order)


def figures(model: Any, name: str, out: Path, taken: list[Step]) -> dict[str, Any]:
    """What the run cost: parameters, bytes, seconds and tokens."""
    told = lk.summary(model)
    seconds, tokens = sum(step.seconds for step in taken), sum(step.tokens for step in taken)
    return {
        "train_seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "steps": taken[-1].step if taken else 0,
        "loss": taken[-1].loss if taken else None,
        "trainable_parameters": next(a.trainable for a in told.adapters if a.name == name),
        "adapter_bytes": (out / "adapter_model.safetensors").stat().st_size,
        "model_bytes": told.base_bytes,
    }


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    installed = {name: metadata.version(name) for name in PACKAGES}
    return {"lorakit": VERSION, "python": platform.python_version(), **installed}


def as_json(value: Any) -> bytes:
    """Readable JSON bytes."""
    return (json.dumps(value, indent=2) + "\n").encode()
