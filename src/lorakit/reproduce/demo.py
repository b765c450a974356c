"""What an adapter is good for, on a real model and real reviews, in some minutes on a laptop."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import lorakit as lk
from lorakit import models
from lorakit.core.atomic import write_files
from lorakit.data import Data, Example, open_data
from lorakit.errors import OutputExists
from lorakit.evaluate import generate_texts, label_scores
from lorakit.methods import DEFAULT
from lorakit.reproduce.run import RESULTS, Outcome, Run, Wrap, adapting, as_json, at_hand, finished
from lorakit.train import Train, draw
from lorakit.train.machine import usual_dtype

BASE = "smollm2-135m"
LABELLER, WRITER = "reviews", "writer"
METRICS, REVIEWS, CURVE = "metrics.jsonl", "reviews.json", "loss.png"
FILES = (RESULTS, METRICS, REVIEWS, CURVE)
TEMPERATURE = 0.5  # of the written reviews


@dataclass(frozen=True)
class Sizes:
    """How many examples each part uses."""

    train: int
    test: int
    writer_train: int
    written: int
    timed_tokens: int
    training: Train = field(default_factory=Train)  # of the first adapter


FULL = Sizes(train=1280, test=400, writer_train=480, written=50, timed_tokens=16)
FEW_STEPS = Train(batch_size=8, learning_rate=2e-3)
QUICK = Sizes(train=240, test=64, writer_train=64, written=10, timed_tokens=8, training=FEW_STEPS)


@dataclass(frozen=True)
class Demo:
    """The model that everything happens on, and the folder where everything is left."""

    model: Any
    tokenizer: Any
    out: Path
    sizes: Sizes
    quick: bool


@dataclass(frozen=True)
class Review:
    """A review that the writer wrote: the sentiment asked for, the text, and what the labeller says of it."""

    asked: str
    text: str
    labelled: str


def begin(out: str | Path, *, quick: bool = False) -> Demo:
    """Load the base and clear what an earlier demo left in `out`, and nothing else.

    Raises:
        OutputExists: `out` is a file, or a folder that holds something else.
    """
    folder = Path(out)
    if folder.exists() and not _is_free(folder):
        raise OutputExists(f"{folder} is, or holds, something that is not a demo's; name another folder with --out")
    model, tokenizer = models.load(BASE, dtype=usual_dtype(None))
    for name in (LABELLER, WRITER):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    write_files(folder, {RESULTS: as_json({"demo": "not finished"})})
    return Demo(at_hand(model), tokenizer, folder, QUICK if quick else FULL, quick)


def _is_free(place: Path) -> bool:
    """Whether it is an empty folder or one that a demo made."""
    try:
        return not any(place.iterdir()) or "demo" in dict(json.loads((place / RESULTS).read_bytes()))
    except (OSError, ValueError, TypeError):
        return False


def label(demo: Demo, wrap: Wrap) -> Outcome:
    """Train the first adapter: is a review negative or positive?"""
    data = Data(source="reviews", train_examples=demo.sizes.train, test_examples=demo.sizes.test)
    run = Run(base=BASE, data=data, out=str(demo.out / LABELLER), train=demo.sizes.training)
    return finished(adapting(demo.model, demo.tokenizer, open_data(data), run, wrap=wrap))


def write(demo: Demo, wrap: Wrap) -> Outcome:
    """Train the second adapter: write a review of a given sentiment."""
    data = Data(source="reviews-writer", train_examples=demo.sizes.writer_train, test_examples=1)
    method, train = DEFAULT(targets=("linear",)), Train(learning_rate=2e-3)
    run = Run(base=BASE, data=data, out=str(demo.out / WRITER), method=method, train=train)
    return finished(adapting(demo.model, demo.tokenizer, replace(open_data(data), test=[]), run, wrap=wrap))


def written(demo: Demo) -> list[Review]:
    """Reviews by the second adapter, half of them to be positive, each labelled by the first."""
    asked = ["positive", "negative"] * (demo.sizes.written // 2)
    prompts = [f"Write a {sentiment} movie review.\nReview:" for sentiment in asked]
    with lk.use(demo.model, WRITER):
        texts = generate_texts(
            demo.model, demo.tokenizer, prompts, max_new_tokens=40, temperature=TEMPERATURE, batch_size=len(prompts)
        )
    labels = ("negative", "positive")
    contexts = [f"Review: {text.strip()}\nSentiment:" for text in texts]
    with lk.use(demo.model, LABELLER):
        scores = label_scores(demo.model, demo.tokenizer, contexts, [f" {label}" for label in labels])
    found = [labels[int(number)] for number in scores.argmax(1)]
    return [Review(*parts) for parts in zip(asked, (text.strip() for text in texts), found, strict=True)]


def mixed(demo: Demo, example: Example) -> list[tuple[str | None, str, str]]:
    """One batch in which neighbouring rows use the base and both adapters: (adapter, prompt, what it writes)."""
    prompts = (example.context, "Write a negative movie review.\nReview:")
    rows = [(name, prompt) for prompt in prompts for name in (None, LABELLER, WRITER)]
    with lk.use(demo.model, [name for name, _ in rows]):
        texts = generate_texts(
            demo.model, demo.tokenizer, [prompt for _, prompt in rows], max_new_tokens=16, batch_size=len(rows)
        )
    return [(name, prompt, text) for (name, prompt), text in zip(rows, texts, strict=True)]


def merging(demo: Demo, example: Example) -> dict[str, Any]:
    """Fold the first adapter in and out: largest logit difference, the original bits, milliseconds a token."""
    model, ids = demo.model, demo.tokenizer(example.context, return_tensors="pt").input_ids.to(demo.model.device)
    lk.use(model, LABELLER)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        attached = model(ids).logits
        lk.merge(model, LABELLER)
        difference = float((model(ids).logits - attached).abs().max())
        lk.unmerge(model)
        after = model.state_dict()
    same = all(torch.equal(value, after[key]) for key, value in before.items())
    return {
        "merged_max_logit_difference": difference,
        "unmerge_bit_exact": same,
        "milliseconds_per_token": _speeds(demo, ids),
    }


def _speeds(demo: Demo, ids: torch.Tensor) -> dict[str, float]:
    """Median milliseconds a generated token of base, attached and merged model, measured in turn."""
    found: dict[str, list[float]] = {"base": [], "attached": [], "merged": []}
    for _ in range(3):
        for side, prepare in _sides(demo.model).items():
            restore = prepare()
            found[side].append(_milliseconds(demo, ids))
            restore()
    return {side: round(statistics.median(values), 2) for side, values in found.items()}


def _sides(model: Any) -> Mapping[str, Callable[[], Callable[[], Any]]]:
    """For each side: a function that puts the model into that state and gives one that takes it back."""

    def routed(what: str | None) -> Callable[[], Any]:
        lk.use(model, what)
        return lambda: lk.use(model, None)

    def merged() -> Callable[[], Any]:
        lk.merge(model, LABELLER)
        return lambda: lk.unmerge(model)

    return {"base": lambda: routed(None), "attached": lambda: routed(LABELLER), "merged": merged}


def _milliseconds(demo: Demo, ids: torch.Tensor) -> float:
    new, began = demo.sizes.timed_tokens, time.perf_counter()
    pad = demo.tokenizer.pad_token_id
    demo.model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=pad)
    return 1000 * (time.perf_counter() - began) / new


def finish(
    demo: Demo, labelled: Outcome, writer: Outcome, reviews: list[Review], folded: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Gather and write `results.json`, and put the first adapter's metrics and loss curve beside it."""
    told, written, right = labelled.results, writer.results, sum(review.asked == review.labelled for review in reviews)
    results = {
        "demo": "quick" if demo.quick else "finished",
        "quick": demo.quick,
        "accuracy_before": told["base"]["accuracy"],
        "accuracy_after": told["adapter"]["accuracy"],
        "test_examples": len(labelled.data.test),
        **{key: told[key] for key in ("train_seconds", "tokens_per_second", "adapter_bytes", "model_bytes")},
        "trainable_parameters": told["trainable_parameters"],
        "tokens": told["tokens"] + written["tokens"],
        "computed": told["computed"] + written["computed"],
        **folded,
        "written_reviews": len(reviews),
        "written_as_asked": right / len(reviews),
        "seconds": round(seconds, 1),
    }
    write_files(
        demo.out,
        {
            RESULTS: as_json(results),
            METRICS: (demo.out / LABELLER / METRICS).read_bytes(),
            REVIEWS: as_json([vars(review) for review in reviews]),
        },
    )
    draw(demo.out / LABELLER, demo.out / CURVE)
    return results
