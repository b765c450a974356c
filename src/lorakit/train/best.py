"""The best of a run's evaluations: when to stop for want of a better one, and how to keep its state.

What counts is the first number that an evaluation gives; lower is better. Earlier evaluations are those in
`metrics.jsonl`, so a resumed run decides as one that was never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lorakit.train import metrics

Evaluation = Mapping[str, float]


class Evaluated(NamedTuple):
    """The number that counts of the evaluation after a step."""

    step: int
    value: float


def evaluated(folder: str | Path) -> list[Evaluated]:
    """The evaluations in the metrics of a run's folder, in the order of the steps."""
    rows = metrics.read(Path(folder)) if (Path(folder) / metrics.METRICS).exists() else []
    return [Evaluated(row["step"], counted(row["evaluation"])) for row in rows if row["evaluation"]]


def counted(evaluation: Evaluation) -> float:
    """The number that counts."""
    return next(iter(evaluation.values()))


def best(found: Sequence[Evaluated]) -> Evaluated:
    """The first of those with the lowest value; what is not a number comes last.

    >>> best([Evaluated(10, 2.0), Evaluated(20, 1.5), Evaluated(30, float("nan")), Evaluated(40, 1.5)]).step
    20
    """
    return min(found, key=lambda each: (math.isnan(each.value), each.value))


def why_over(found: Sequence[Evaluated], patience: int) -> str:
    """Why a run goes no further after these evaluations; "" where it does, as it always does with a patience of 0.

    >>> why_over([Evaluated(10, 1.5), Evaluated(20, 2.0), Evaluated(30, 1.8)], patience=2)
    'stopped after step 30: no evaluation since step 10 was better (1.5, patience=2)'
    """
    if not patience or not found:
        return ""
    least = best(found)
    if len(found) - 1 - found.index(least) < patience:
        return ""
    told = f"({least.value:.4g}, patience={patience})"
    return f"stopped after step {found[-1].step}: no evaluation since step {least.step} was better {told}"


def keep_best(
    evaluate: Callable[[], Evaluation], save: Callable[[], None], out: str | Path
) -> Callable[[], Evaluation]:
    """The same evaluation, which calls `save` where it is better than all in the metrics of `out`.

    The state is saved before its step is recorded. So what the metrics call the best has been kept, wherever the run
    was killed.

    Example:
        ```python
        evaluate = keep_best(evaluate, lambda: lk.save(model, "reviews", "out/reviews/best"), "out/reviews")
        for step in train.run(model, feed, Train(evaluate_every=50), out="out/reviews", evaluate=evaluate):
            ...
        ```
    """

    def kept() -> Evaluation:
        found = evaluate()
        now = Evaluated(0, counted(found))  # of a step that is not recorded yet
        if best([*evaluated(out), now]) is now:
            save()
        return found

    return kept
