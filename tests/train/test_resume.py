from __future__ import annotations

import itertools
import logging
import os
import random
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit import train
from lorakit.core.state import adapter_tensors
from lorakit.errors import Interrupted, LorakitError, OutputExists
from lorakit.train import checkpoint, metrics
from lorakit.train.metrics import read
from tests.train import small
from tests.train.small import SETTINGS, adapted, feed

ROOT = Path(__file__).parents[2]
ADAPTER = "adapter_model.safetensors"


def run(out: Path, *, resume: bool = False, stop_after: int = 99, model: Any = None, **changes: Any) -> Any:
    """Run the small training up to a step; gives the model."""
    model = adapted() if model is None else model
    steps = train.run(model, feed(), replace(SETTINGS, **changes), name="a", out=out, resume=resume)
    for step in steps:
        if step.step == stop_after:
            steps.close()
    return model


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in adapter_tensors(model, "a").items()}


def same(one: Any, other: Any) -> bool:
    ours, theirs = bits(one), bits(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def steps_in(folder: Path) -> list[int]:
    return [row["step"] for row in read(folder)]


def child(out: Path, stdin: int, *flags: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.train.child", str(out), *flags]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=stdin, stdout=subprocess.PIPE, text=True)


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    lk.save(whole, "a", tmp_path / "whole" / "adapter")
    fatal = random.SystemRandom().randrange(1, 12)
    with child(tmp_path / "killed", subprocess.PIPE) as killed:
        assert killed.stdout is not None
        while int(killed.stdout.readline()) < fatal:
            pass
        os.kill(killed.pid, signal.SIGKILL)
    assert not (tmp_path / "killed" / "adapter").exists()
    with child(tmp_path / "killed", subprocess.DEVNULL, "--resume") as resumed:
        resumed.communicate()
    assert resumed.returncode == 0
    wanted, found = (tmp_path / side / "adapter" / ADAPTER for side in ("whole", "killed"))
    assert found.read_bytes() == wanted.read_bytes(), f"killed after step {fatal}"
    assert steps_in(tmp_path / "killed") == list(range(1, 13))


@pytest.mark.parametrize("stop_after", [1, 5, 6, 11])
def test_a_stopped_run_resumes_to_the_same_bits_and_losses(tmp_path: Path, stop_after: int) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "stopped", stop_after=stop_after)
    resumed = run(tmp_path / "stopped", resume=True)
    assert same(whole, resumed)
    losses = [[row["loss"] for row in read(tmp_path / side)] for side in ("whole", "stopped")]
    assert losses[0] == losses[1]


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "stopped", stop_after=10)
    older, newer = sorted((tmp_path / "stopped" / "checkpoints").iterdir())
    assert [older.stem, newer.stem] == ["step-00000006", "step-00000009"]
    content = bytearray(newer.read_bytes())
    content[-1] ^= 1
    newer.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        resumed = run(tmp_path / "stopped", resume=True)
    assert "damaged" in caplog.text and newer.name in caplog.text
    assert same(whole, resumed)
    assert [path.stem for path in sorted(newer.parent.iterdir())] == ["step-00000009", "step-00000012"]


@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_truncated_checkpoint_is_damaged(tmp_path: Path, size: int) -> None:
    run(tmp_path, stop_after=4)
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.newest(path.parent) is not None
    path.write_bytes(path.read_bytes()[:size])
    assert checkpoint.newest(path.parent) is None


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, stop_after=5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]
    steps = train.run(adapted(), feed(), SETTINGS, name="a", out=tmp_path, resume=True)
    assert next(steps).step == 4
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    model = run(tmp_path)
    assert same(model, run(tmp_path, resume=True))
    assert steps_in(tmp_path) == list(range(1, 13))


def test_a_finished_run_without_checkpoints_on_the_way_is_not_trained_again(tmp_path: Path) -> None:
    model = run(tmp_path, checkpoint_every=0)
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    steps = train.run(
        other := adapted(), feed(), replace(SETTINGS, checkpoint_every=0), name="a", out=tmp_path, resume=True
    )
    assert list(steps) == [] and same(model, other)
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines


def test_a_run_can_be_resumed_under_another_name(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "stopped", stop_after=5)
    (tmp_path / "stopped").rename(tmp_path / "renamed")
    resumed = adapted(name="renamed")
    list(train.run(resumed, feed(), SETTINGS, name="renamed", out=tmp_path / "renamed", resume=True))
    found = adapter_tensors(resumed, "renamed")
    assert all(torch.equal(found[key], value) for key, value in bits(whole).items())


def test_resuming_where_nothing_was_starts_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "new", stop_after=1)
    assert not caplog.text
    run(tmp_path / "other", resume=True, stop_after=1)
    assert "nothing to resume" in caplog.text
    with pytest.raises(LorakitError, match="output folder"):
        train.run(adapted(), feed(), SETTINGS, name="a", resume=True)


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    run(tmp_path, stop_after=4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputExists, match="another run"):
        run(tmp_path)
    with pytest.raises(OutputExists, match=r"learning_rate is 0\.01 there and 0\.5 here"):
        run(tmp_path, resume=True, learning_rate=0.5)
    with pytest.raises(OutputExists, match="base is"):
        run(tmp_path, resume=True, model=adapted(seed=5))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "training.json").unlink()
    with pytest.raises(OutputExists, match="choose another"):
        run(tmp_path, resume=True)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C while the batches of a step are put together."""
    collated = []
    real = small.collate

    def collate(*args: Any) -> Any:
        collated.append(args)
        if len(collated) == 2 + 2 * (step - 1):  # the first batch is the one that tries out the loss
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(small, "collate", collate)


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        interrupt_at(5, patched)
        with pytest.raises(Interrupted, match=r"after step 4 of 12; .*step-00000004.*--resume"):
            run(tmp_path, checkpoint_every=0, padding=True)
    assert signal.getsignal(signal.SIGINT) is handler
    assert same(run(tmp_path, resume=True, padding=True), run(tmp_path / "whole", padding=True))


def test_ctrl_c_in_the_last_pass_of_a_step_lets_the_step_be_taken(tmp_path: Path) -> None:
    model, passes = adapted(), itertools.count(1)

    def press(*_: Any) -> None:
        if model.training and next(passes) == 8:
            signal.raise_signal(signal.SIGINT)

    model.model.register_forward_hook(press)
    with pytest.raises(Interrupted, match="after step 4 of 12"):
        run(tmp_path, model=model)
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    assert same(run(tmp_path, resume=True), run(tmp_path / "whole"))


@pytest.mark.parametrize("out", ["run", None])
def test_ctrl_c_in_an_evaluation_or_given_by_the_caller(tmp_path: Path, out: str | None) -> None:
    def evaluate() -> dict[str, float]:
        raise KeyboardInterrupt

    place = None if out is None else tmp_path / out
    steps = train.run(adapted(), feed(), replace(SETTINGS, evaluate_every=5), name="a", out=place, evaluate=evaluate)
    with pytest.raises(KeyboardInterrupt if out is None else Interrupted):
        list(steps)
    steps = train.run(adapted(), feed(), SETTINGS, name="a", out=place and tmp_path / "other")
    next(steps)
    with pytest.raises(KeyboardInterrupt if out is None else Interrupted):
        steps.throw(KeyboardInterrupt())
    if out is not None:
        assert steps_in(tmp_path / out) == [1, 2, 3, 4, 5]
        assert checkpoint.newest(tmp_path / "other" / "checkpoints").step == 1  # type: ignore[union-attr]


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    run(tmp_path, stop_after=5)
    before = sorted(tmp_path.rglob("*"))
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, free[1]))  # metrics fit, checkpoints do not
    try:
        with pytest.raises(LorakitError, match="could not be written"):
            run(tmp_path, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    assert sorted(tmp_path.rglob("*")) == before
    assert same(run(tmp_path, resume=True), run(tmp_path / "whole"))


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    run(tmp_path, stop_after=4)
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(lines) + 10, free[1]))
    try:
        with pytest.raises(LorakitError, match="step 5 is not in it"):
            metrics.append(tmp_path, train.Step(5, 9, 1.0, 1.0, 1.0, 1, 1.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines
