"""What each tracking service has of a run after it ended, was stopped, killed, resumed or failed."""

from __future__ import annotations

import itertools
import json
import logging
import random
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from lorakit import train
from lorakit.errors import Interrupted, LorakitError, MissingPackage, UnknownName
from lorakit.train import Step, track
from lorakit.train.metrics import append, read
from tests.train.small import SETTINGS, adapted, feed

CONFIG = {"base": "tiny", "train": {"seed": 3, "steps": None}}
Rows = list[tuple[int, float]]  # each step with its loss, in the order in which they were written


def in_tensorboard(out: Path) -> Rows:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(each.step, each.value) for each in EventAccumulator(str(out)).Reload().Scalars("loss")]


def in_mlflow(out: Path) -> Rows:
    from mlflow import MlflowClient

    run = json.loads((out / "tracked.json").read_text())["mlflow"]
    return [(each.step, each.value) for each in MlflowClient().get_metric_history(run, "loss")]


def in_wandb(out: Path) -> Rows:
    """What stands in the newest offline part: a log of length-prefixed records in blocks of 32 KiB."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its service writes when it likes, and has written all when it ends
    content = max(out.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns).read_bytes()
    rows, parts, at = [], b"", 7
    while at + 7 <= len(content):
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts, at = parts + content[at + 7 : at + 7 + length], at + 7 + length
        at += -at % 32768 if 32768 - at % 32768 < 7 else 0
        if kind in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(parts), b""
            values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            rows += [(record.history.step.num, float(values["loss"]))] if "loss" in values else []
    return rows


def in_trackio(out: Path) -> Rows:
    from trackio.sqlite_storage import SQLiteStorage

    run = json.loads((out / "tracked.json").read_text())["trackio"]
    return [(row["step"], row["loss"]) for row in SQLiteStorage.get_logs("lorakit", run=out.name, run_id=run)]


IN: dict[str, Callable[[Path], Rows]] = {
    "tensorboard": in_tensorboard,
    "mlflow": in_mlflow,
    "wandb": in_wandb,
    "trackio": in_trackio,
}


@pytest.fixture(scope="module")
def trackio_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trackio")  # which trackio reads once, when it is imported


@pytest.fixture(params=IN)
def service(
    request: pytest.FixtureRequest, tmp_path: Path, trackio_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    monkeypatch.setenv("TRACKIO_DIR", str(trackio_home))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    pytest.importorskip("sqlalchemy" if request.param == "mlflow" else request.param)
    pytest.importorskip(request.param)
    yield request.param


def run(out: Path, to: Any, *, resume: bool = False, stop_after: int = 99) -> list[Step]:
    """The small training, tracked; stopping closes it as an error in the caller's lines would."""
    steps = train.run(adapted(), feed(), SETTINGS, name="a", out=out, resume=resume)
    return list(itertools.islice(track.track(steps, to, out, CONFIG), stop_after))


def wanted(out: Path) -> Rows:
    return [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in read(out)]


def test_a_run_is_there_with_all_its_steps(service: Any, tmp_path: Path) -> None:
    out = tmp_path / f"reviews-{service}"
    assert [step.step for step in run(out, service)] == list(range(1, 13))
    assert IN[service](out) == wanted(out)


@pytest.mark.parametrize("stop_after", [2, 5])
def test_a_resumed_run_goes_on_in_the_same_one_and_writes_no_step_twice(
    service: Any, tmp_path: Path, stop_after: int
) -> None:
    out = tmp_path / f"stopped-{service}-{stop_after}"
    run(out, service, stop_after=stop_after)  # the newest checkpoint is of none, or of step 3
    ids = (out / "tracked.json").read_text()
    run(out, service, resume=True)
    assert (out / "tracked.json").read_text() == ids
    assert IN[service](out) == wanted(out)
    assert len(wanted(out)) == 12


def test_a_service_that_comes_late_gets_the_steps_before(service: Any, tmp_path: Path) -> None:
    out = tmp_path / f"late-{service}"
    run(out, "none", stop_after=7)
    assert not (out / "tracked.json").exists()
    run(out, service, resume=True)
    assert IN[service](out) == wanted(out)


def test_two_runs_of_one_name_are_two(service: Any, tmp_path: Path) -> None:
    one, other = tmp_path / "one" / f"same-{service}", tmp_path / "other" / f"same-{service}"
    run(one, service, stop_after=4)
    run(other, service)
    run(one, service, resume=True)
    assert IN[service](one) == wanted(one) and IN[service](other) == wanted(other)


def test_what_is_told_of_a_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = [Step(n, 4, 1.0, 1e-3, 0.5, 100, 0.5, {"held_out_loss": 2.0} if n % 2 == 0 else None) for n in range(1, 5)]
    assert list(track.track(iter(steps), "tensorboard", tmp_path, CONFIG)) == steps
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [each.step for each in events.Scalars("evaluation/held_out_loss")] == [2, 4]
    assert [each.value for each in events.Scalars("tokens_per_second")] == [200.0] * 4
    assert {"loss", "learning_rate", "gradient_norm", "seconds"} <= set(events.Tags()["scalars"])
    assert not {"step", "steps"} & set(events.Tags()["scalars"])
    (told,) = events.Tensors("run/text_summary")
    assert b"train.seed = 3" in told.tensor_proto.string_val[0]


def test_how_a_run_ended_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[bool] = []
    service = track.Tracked("id", 0, lambda step, values: None, ends.append)
    monkeypatch.setitem(track.SERVICES, "tensorboard", lambda *_: service)  # type: ignore[arg-type]
    monkeypatch.setattr(track, "require", lambda to: None)
    run(tmp_path / "whole", "tensorboard")
    stopped = track.track(train.run(adapted(), feed(), SETTINGS, name="a"), "tensorboard", tmp_path / "closed")
    next(stopped)
    stopped.close()
    assert ends == [True, True]
    steps = train.run(adapted(), feed(), SETTINGS, name="a", out=tmp_path / "pressed")
    pressed = track.track(steps, "tensorboard", tmp_path / "pressed")
    next(pressed)
    with pytest.raises(Interrupted, match="after step 1 of 12"):
        pressed.throw(KeyboardInterrupt())
    assert ends == [True, True, False]


def test_a_service_that_fails_on_the_way_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written: list[int] = []

    def write(step: int, values: Any) -> None:
        if step == 4:
            raise ConnectionError("no route")
        written.append(step)

    monkeypatch.setitem(track.SERVICES, "wandb", lambda *_: track.Tracked("id", 0, write, lambda done: None))  # type: ignore[arg-type]
    monkeypatch.setattr(track, "require", lambda to: None)
    with caplog.at_level(logging.WARNING):
        assert len(run(tmp_path, "wandb")) == 12
    assert written == [1, 2, 3]
    assert caplog.text.count("wandb takes no more of this run (no route)") == 1


def test_a_service_that_cannot_be_opened_is_a_sentence_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> track.Tracked:
        raise ValueError("no key")

    monkeypatch.setitem(track.SERVICES, "mlflow", refuse)  # type: ignore[arg-type]
    monkeypatch.setattr(track, "require", lambda to: None)
    with pytest.raises(LorakitError, match="mlflow cannot be opened for the run 'reviews': no key"):
        run(tmp_path / "reviews", "mlflow")
    run(tmp_path / "reviews", "none")  # the folder is still free


@pytest.mark.parametrize("content", ['{"wandb": ', "[]"])
def test_a_damaged_record_is_a_new_tracked_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    known: list[str | None] = []

    def opened(out: Path, config: Any, id: str | None) -> track.Tracked:
        known.append(id)
        return track.Tracked("new", 0, lambda step, values: None, lambda done: None)

    monkeypatch.setitem(track.SERVICES, "wandb", opened)  # type: ignore[arg-type]
    monkeypatch.setattr(track, "require", lambda to: None)
    (tmp_path / "tracked.json").write_text(content)
    assert len(run(tmp_path, "wandb")) == 12
    assert known == [None] and json.loads((tmp_path / "tracked.json").read_text()) == {"wandb": "new"}
    assert "tracked.json is damaged" in caplog.text and "tracked as a new one" in caplog.text


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "require", lambda to: None)
    (tmp_path / "file").touch()
    with pytest.raises(LorakitError, match=r"tensorboard cannot be opened for the run 'x': .*Not a directory"):
        run(tmp_path / "file" / "x", "tensorboard")


def test_wandb_is_asked_for_the_step_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    logged: list[int] = []
    there = SimpleNamespace(id="x1", step=6, finish=lambda exit_code: None)
    there.log = lambda values, step, commit: logged.append(step)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **given: asked.update(given) or there)
    (tmp_path / "tracked.json").write_text('{"wandb": "x1"}')
    run(tmp_path, "wandb")
    assert logged == list(range(6, 13))
    assert (asked["id"], asked["resume"], asked["name"]) == ("x1", "allow", tmp_path.name)


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()  # a folder that wandb left here is no package
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for service in IN:
        monkeypatch.delitem(sys.modules, service, raising=False)
        with pytest.raises(MissingPackage, match=f"pip install {service}"):
            track.require(service)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="did you mean wandb"):
        track.require("wandbb")  # type: ignore[arg-type]


def test_each_service_of_the_field_is_there() -> None:
    assert set(get_args(track.To)) == {"none", *track.SERVICES} == {"none", *IN}


def test_steps_that_a_killed_run_did_not_send_are_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = random.Random(0).randrange(1, 6)
    steps = [Step(n, 9, 1.0 / n, 1e-3, 0.5, 100, 0.5) for n in range(1, 10)]
    for step in steps[:7]:
        append(tmp_path, replace(step))
    written: list[int] = []
    service = track.Tracked("id", last, lambda step, values: written.append(step), lambda done: None)
    monkeypatch.setitem(track.SERVICES, "trackio", lambda *_: service)  # type: ignore[arg-type]
    monkeypatch.setattr(track, "require", lambda to: None)
    list(track.track(iter(steps[6:]), "trackio", tmp_path))
    assert written == list(range(last + 1, 10))
