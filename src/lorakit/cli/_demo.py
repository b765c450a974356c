"""The demo's story on the terminal."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.text import Text

from lorakit.cli._show import console, program, say, size, table
from lorakit.reproduce import demo
from lorakit.reproduce.run import Outcome
from lorakit.train import Step, show

SHORT = 60  # characters of a text in a table


def tell(out: str, *, quick: bool) -> None:
    """Run every part, and print what happened after each."""
    began = time.monotonic()
    told = demo.begin(out, quick=quick)
    _head(f"1  Learn from {told.sizes.train:,} reviews whether a review is positive")
    labelled = demo.label(told, _shown)
    _labelled(labelled)
    _head("2  Learn, with a second adapter on the same base, to write one")
    writer = demo.write(told, _shown)
    _computed(writer)
    reviews = demo.written(told)
    _reviews(reviews)
    _head("3  One batch, three models: each row uses the adapter it names")
    rows = demo.mixed(told, labelled.data.test[0])
    named = [[name or "the base", _short(prompt), _short(text, 48)] for name, prompt, text in rows]
    table("", ["row uses", "prompt", "writes"], named, texts=3)
    _head("4  Fold the adapter into the weights, and take it out again")
    folded = demo.merging(told, labelled.data.test[0])
    _folded(folded)
    results = demo.finish(told, labelled, writer, reviews, folded, time.monotonic() - began)
    _results(results)
    _next(out)


def _shown(steps: Iterator[Step]) -> Iterator[Step]:
    return show(steps, console)


def _head(text: str) -> None:
    say(Text(f"\n{text}", style="bold cyan"))


def _short(text: str, width: int = SHORT) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else f"{flat[: width - 1]}…"


def _labelled(outcome: Outcome) -> None:
    before, after = (outcome.results[side]["accuracy"] for side in ("base", "adapter"))
    count = outcome.results["trainable_parameters"]
    told = f"{count:,} trained numbers took the accuracy on {len(outcome.data.test):,} unseen reviews from "
    say(Text.assemble(told, (f"{before:.3f}", "bold"), " to ", (f"{after:.3f}", "bold"), "."))


def _computed(outcome: Outcome) -> None:
    tokens, computed = (outcome.results[key] for key in ("tokens", "computed"))
    say(f"Of {tokens:,} tokens {computed:,} had to be computed: no padding, and a prompt that examples share but once.")


def _reviews(reviews: list[demo.Review]) -> None:
    right = sum(review.asked == review.labelled for review in reviews)
    shown = [[review.asked, review.labelled, _short(review.text, 84)] for review in reviews[:6]]
    table("", ["asked for", "labelled", "what it wrote"], shown, texts=3)
    say(f"The first adapter labels {right} of {len(reviews)} written reviews as they were asked for.")


def _folded(found: Mapping[str, Any]) -> None:
    kept = "every bit is as it was" if found["unmerge_bit_exact"] else "BITS HAVE CHANGED"
    say(
        f"Merged, the logits differ from the attached model's by at most {found['merged_max_logit_difference']:.1e}, "
        f"and no adapter code runs. Unmerged, {kept}."
    )


def _results(found: Mapping[str, Any]) -> None:
    speeds = " / ".join(f"{value:.1f}" for value in found["milliseconds_per_token"].values())
    table(
        "What you have now" + (" (a quick run: few examples, so the numbers are rough)" if found["quick"] else ""),
        ["", ""],
        [
            ["accuracy before / after", f"{found['accuracy_before']:.3f} / {found['accuracy_after']:.3f}"],
            ["written reviews labelled as asked", f"{found['written_as_asked']:.0%}"],
            ["trained numbers", f"{found['trainable_parameters']:,}"],
            ["the adapter's file", f"{size(found['adapter_bytes'])}"],
            ["the model's weights", f"{size(found['model_bytes'])}"],
            ["training", f"{found['train_seconds']:.0f} s at {found['tokens_per_second']:.0f} tokens/s"],
            ["tokens that both read / had to compute", f"{found['tokens']:,} / {found['computed']:,}"],
            ["ms a token: base / attached / merged", speeds],
            ["merged against attached, largest logit difference", f"{found['merged_max_logit_difference']:.1e}"],
            ["unmerged weights have the original bits", "yes" if found["unmerge_bit_exact"] else "NO"],
            ["the whole demo", f"{found['seconds']:.0f} s"],
        ],
    )


def _next(out: str) -> None:
    writer = shlex.quote(os.path.join(out, demo.WRITER))
    beside = shlex.quote(os.path.normpath(os.path.join(out, os.pardir, "reviews-rank4")))
    say(f"{out} holds both adapters, loss.png, metrics.jsonl, reviews.json and results.json. Try next:")
    say(f"  {program()} generate {writer} --prompt $'Write a positive movie review.\\nReview:' --beside_base")
    say(f"  {program()} train --base {demo.BASE} --data reviews --method.rank 4 --out {beside}")
