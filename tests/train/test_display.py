from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lorakit import train
from lorakit.errors import Interrupted, LorakitError
from lorakit.train import Step, metrics
from tests.train.small import SETTINGS, adapted, feed

STEPS = [Step(n, 30, 2.0 / n, 1e-3, 1.0, 100, 0.5, {"accuracy": n / 30} if n % 10 == 0 else None) for n in range(1, 31)]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_display_passes_every_step_on_and_shows_its_figures(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    assert list(train.show(iter(STEPS), console)) == STEPS
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for figure in ("loss", "lr 1.00e-03", "200 tokens/s", "30/30", "left"):
        assert figure in shown
    assert terminal or len(shown.splitlines()) == 10


def test_ctrl_c_in_the_display_reaches_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(steps: Iterator[Step], console: Console) -> Iterator[Step]:
        yield next(steps)
        raise KeyboardInterrupt

    monkeypatch.setattr("lorakit.train.progress._lines", interrupted)
    steps = train.run(adapted(), feed(), SETTINGS, name="a", out=tmp_path)
    with pytest.raises(Interrupted, match="after step 1 of 12"):
        list(train.show(steps, Console(file=io.StringIO())))


def test_the_curve_is_a_picture_that_depends_on_the_metrics_alone(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        for step in STEPS:
            metrics.append(tmp_path / folder, replace(step, seconds=0.5 if folder == "one" else 0.7))
    one, other = train.draw(tmp_path / "one"), train.draw(tmp_path / "other", tmp_path / "elsewhere" / "curve.png")
    assert one == tmp_path / "one" / "loss.png"
    assert one.read_bytes().startswith(b"\x89PNG") and one.read_bytes() == other.read_bytes()
    with pytest.raises(LorakitError, match="no curve to draw"):
        train.draw(tmp_path)


def test_importing_training_and_evaluation_draws_and_shows_nothing() -> None:
    code = "import sys, lorakit.train, lorakit.evaluate; print(*sys.modules)"
    source = Path(train.__file__).parents[2]
    python = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=source)
    loaded = python.stdout.split()
    assert {"lorakit.train.loop", "lorakit.evaluate.scores"} <= set(loaded)
    assert not {"matplotlib", "rich", "transformers", "datasets"} & set(loaded)
