"""Stopping early and keeping the best, in runs that are never stopped and in runs that are killed and resumed."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lorakit as lk
from lorakit import train
from lorakit.core.state import adapter_tensors
from lorakit.errors import Interrupted
from lorakit.train import Step
from lorakit.train.best import Evaluated, best, evaluated, keep_best, why_over
from lorakit.train.metrics import append, read
from tests.train.small import SETTINGS, adapted, feed

LOSSES: list[Any] = [5.0, 3.0, 4.0, 2.0, 2.0, math.nan, 9.0, 1.0, 0.5, 0.4, 0.3, 0.2]


def by_table(out: Path) -> Callable[[], Mapping[str, float]]:
    """The loss that stands in the table for the step in hand, which is the one after those in the metrics."""

    def evaluate() -> dict[str, float]:
        found = LOSSES[len(read(out)) if (out / "metrics.jsonl").exists() else 0]
        if isinstance(found, KeyboardInterrupt):
            raise found
        return {"loss": found, "other": 1.0}

    return evaluate


def run(out: Path, *, resume: bool = False, stop_after: int = 99, **changes: Any) -> Any:
    """The small training, evaluated by the table after each step, with its best adapter in `out/best`."""
    model, settings = adapted(), replace(SETTINGS, **{"evaluate_every": 1, **changes})
    evaluate = keep_best(by_table(out), lambda: lk.save(model, "a", out / "best"), out)
    steps = train.run(model, feed(), settings, name="a", out=out, resume=resume, evaluate=evaluate)
    for _ in itertools.islice(steps, stop_after):
        pass
    return model


def steps_in(out: Path) -> list[int]:
    return [row["step"] for row in read(out)]


def kept(out: Path) -> bytes:
    return (out / "best" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(("patience", "last"), [(0, 12), (1, 3), (2, 6), (3, 7), (4, 12)])
def test_a_run_stops_after_as_many_evaluations_without_a_better_one(
    tmp_path: Path, patience: int, last: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run(tmp_path, patience=patience)
    assert steps_in(tmp_path) == list(range(1, last + 1))
    assert caplog.text.count(f"stopped after step {last}: no evaluation since step") == (last < 12)


def test_only_evaluated_steps_count() -> None:
    values = iter([2.0, 1.0, 1.5, 1.5])
    settings = replace(SETTINGS, evaluate_every=2, patience=2)
    steps = list(train.run(adapted(), feed(), settings, name="a", evaluate=lambda: {"loss": next(values)}))
    assert [step.step for step in steps if step.evaluation] == [2, 4, 6, 8] and len(steps) == 8


def test_without_an_evaluation_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    assert len(list(train.run(adapted(), feed(), replace(SETTINGS, patience=1), name="a", out=tmp_path))) == 12


def test_a_number_that_is_none_is_never_the_best() -> None:
    found = [Evaluated(n, value) for n, value in enumerate([math.nan, math.nan, 3.0, math.nan, 4.0], start=1)]
    assert best(found).step == 3 and best(found[:2]).step == 1
    assert why_over(found, 2) and not why_over(found, 3) and not why_over([], 1)


def test_the_best_state_is_kept_and_the_metrics_tell_its_step(tmp_path: Path) -> None:
    run(tmp_path / "seven", stop_after=7)
    assert best(evaluated(tmp_path / "seven")) == (4, 2.0)
    lk.save(run(tmp_path / "four", stop_after=4), "a", tmp_path / "after-four")
    assert kept(tmp_path / "seven") == (tmp_path / "after-four" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("stop_after", [2, 4, 6])
@pytest.mark.parametrize("checkpoint_every", [0, 1, 5])
def test_a_killed_run_resumes_to_the_same_stop_and_the_same_best(
    tmp_path: Path, stop_after: int, checkpoint_every: int
) -> None:
    whole = run(tmp_path / "whole", patience=2, checkpoint_every=checkpoint_every)  # ends after step 6
    run(tmp_path / "killed", stop_after=stop_after, patience=2, checkpoint_every=checkpoint_every)
    resumed = run(tmp_path / "killed", resume=True, patience=2, checkpoint_every=checkpoint_every)
    assert steps_in(tmp_path / "killed") == [1, 2, 3, 4, 5, 6]
    ours, theirs = adapter_tensors(whole, "a"), adapter_tensors(resumed, "a")
    assert all(ours[key].equal(theirs[key]) for key in ours)
    assert kept(tmp_path / "whole") == kept(tmp_path / "killed")


@pytest.mark.parametrize("step", [4, 6, 12])  # the best; the one after which it is over; the last of all
def test_an_evaluation_that_ctrl_c_cut_short_is_made_up_for(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience = 0 if step == 12 else 2
    run(tmp_path / "whole", patience=patience)
    with monkeypatch.context() as patched, pytest.raises(Interrupted, match=f"after step {step} of 12"):
        patched.setattr("tests.train.test_best.LOSSES", [*LOSSES[: step - 1], KeyboardInterrupt()])
        run(tmp_path / "pressed", patience=patience)
    run(tmp_path / "pressed", resume=True, patience=patience)
    assert str(evaluated(tmp_path / "whole")) == str(evaluated(tmp_path / "pressed"))
    assert kept(tmp_path / "whole") == kept(tmp_path / "pressed")


def test_a_run_that_stopped_early_resumes_to_itself_or_goes_on_with_more_patience(tmp_path: Path) -> None:
    model = run(tmp_path, patience=2, checkpoint_every=0)
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    again = run(tmp_path, resume=True, patience=2, checkpoint_every=0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines
    ours, theirs = adapter_tensors(model, "a"), adapter_tensors(again, "a")
    assert all(ours[key].equal(theirs[key]) for key in ours)
    run(tmp_path, resume=True, patience=4, checkpoint_every=0)
    assert steps_in(tmp_path) == list(range(1, 13))


def test_the_best_is_saved_before_its_step_is_recorded(tmp_path: Path) -> None:
    recorded: list[int] = []
    evaluate = keep_best(lambda: {"loss": 1.0}, lambda: recorded.append(len(evaluated(tmp_path))), tmp_path)
    assert evaluate() == {"loss": 1.0}
    append(tmp_path, Step(1, 2, 1.0, 1.0, 1.0, 1, 1.0, {"loss": 1.0}))
    evaluate()  # as good as the best is not better
    assert recorded == [0]
