"""`lorakit sweep`: a run's TOML and a table of values, typed by the dataclasses that type a run."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

import lorakit.cli.sweep as verb
from lorakit.cli import _declare, main
from lorakit.reproduce.run import Run
from lorakit.reproduce.sweep import Table
from tests.reproduce import small
from tests.source import ROOT

EXAMPLE = ROOT / "examples" / "sweep.toml"
SWEPT = '"method.rank" = [2, 4]\ntrain.seed = [0, 1]'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    small.write(tmp_path)
    return tmp_path


def command(place: Path, *more: str, swept: str = SWEPT, top: str = "") -> list[str]:
    data = f'[data]\nsource = "{place / "rows.csv"}"\ncontext = "text"\nlabel = "verdict"'
    train = "[train]\nsteps = 2\nbatch_size = 4"
    text = f'base = "{place / "base"}"\n{top}\n{data}\n{train}\n[sweep]\n{swept}\n'
    (place / "sweep.toml").write_text(text)
    return ["sweep", "--config", str(place / "sweep.toml"), "--out", str(place / "out"), *more]


def runs_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Run]:
    """The runs that a command declares; none is carried out."""
    found: dict[str, Run] = {}

    def declared(sweep: Any, declare: Any, **told: Any) -> Table:
        found.update({name: declare(values) for name, values in sweep.combinations().items()})
        return Table([], "loss")

    monkeypatch.setattr(verb, "carry_out", declared)
    assert main(words) == 0
    return found


def test_a_sweep_trains_every_combination_and_prints_a_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(place)) == 0
    told = capsys.readouterr().out
    assert "4 of 4 runs, by accuracy" in told
    header = next(line.split() for line in told.splitlines() if "accuracy" in line and "rank" in line)
    assert header == ["rank", "seed", "accuracy", "loss", "train_seconds"]
    assert "rank=4,seed=1: 2 steps, loss" in told
    rows = json.loads((place / "out" / "sweep.json").read_text())["runs"]
    assert {row["name"] for row in rows} == {f"rank={rank},seed={seed}" for rank in (2, 4) for seed in (0, 1)}
    for row in rows:
        told_run = json.loads((place / "out" / row["name"] / "run.json").read_text())["run"]
        assert told_run["method"]["rank"] == row["values"]["method.rank"]
        assert told_run["train"]["seed"] == row["values"]["train.seed"] and told_run["train"]["steps"] == 2


def test_a_run_of_a_sweep_is_the_run_that_train_makes(place: Path) -> None:
    assert main(command(place, swept='"train.seed" = [3]')) == 0
    data = ["--data", str(place / "rows.csv"), "--data.context", "text", "--data.label", "verdict"]
    train = ["--train.steps", "2", "--train.batch_size", "4", "--train.seed", "3"]
    assert main(["train", "--base", str(place / "base"), *data, *train, "--out", str(place / "by-itself")]) == 0
    one, other = (place / folder / "adapter_model.safetensors" for folder in ("out/seed=3", "by-itself"))
    assert one.read_bytes() == other.read_bytes()
    runs = [json.loads((path.parent / "run.json").read_text())["run"] | {"out": ""} for path in (one, other)]
    assert runs[0] == runs[1]


def test_a_failed_run_is_told_at_the_end_and_tried_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(place, swept='"method.rank" = [99, 2]')) == 2
    shown = capsys.readouterr()
    assert "rank=99: rank 99 is above the matrix" in shown.out and "1 of 2 runs, by accuracy" in shown.out
    assert "lorakit: 1 of 2 runs failed" in shown.err
    assert main(command(place, swept='"method.rank" = [99, 2]')) == 2
    assert "holds another sweep" in capsys.readouterr().err
    assert main(command(place, "--resume", swept='"method.rank" = [9, 2]')) == 0
    assert "rank=2: 2 steps" not in (told := capsys.readouterr().out) and "rank=9: 2 steps" in told


def test_any_field_varies_and_flags_win(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept = """
        method.name = ["lora", "houlsby"]
        "method.train" = [["norm.attn"], []]
        "train.padding" = [true, false]
        "evaluate.measures" = ["accuracy,perplexity"]
        data.test_share = [0.2]
    """
    runs = runs_of(command(place, "--train.steps", "3", "--data.seed=7", swept=swept), monkeypatch)
    run = runs["name=houlsby,train=no1,padding=True,measures=no1,test_share=0.2"]
    assert (run.method.name, run.method.train, run.train.padding) == ("bottleneck", ("norm.attn",), True)
    assert run.evaluate.measures == ("accuracy", "perplexity")
    assert (run.train.steps, run.train.batch_size, run.data.seed, run.data.test_share) == (3, 4, 7, 0.2)
    assert len(runs) == 8 and {run.method.name for run in runs.values()} == {"lora", "bottleneck"}


def test_what_is_said_once_holds_for_every_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--method", "houlsby", "--method.size", "3", "--method.train", "norm.attn", "--method.train_norms=false"]
    more += ["--train.warmup_share", "0", "--keep", "best", "--train.evaluate_every", "1", "--data.labels", "bad,good"]
    words = command(place, *more, swept='"train.learning_rate" = [1e-5]')
    (run,) = runs_of(words, monkeypatch).values()
    given = [word for word in words[1:] if word not in ("--config", str(place / "sweep.toml"))]
    written = (place / "sweep.toml").read_text().split("[sweep]")[0]
    (place / "run.toml").write_text(written)
    wanted = _declare.parse(
        Run, "train", "", ["--config", str(place / "run.toml"), *given, "--train.learning_rate=1e-5"]
    )
    assert run == wanted


MISTAKES = [
    ('"method.rnk" = [2]', "there is no option --method.rnk; did you mean --method.rank"),
    ('"at_once" = [2]', "there is no option --at_once"),
    ('"method.rank" = ["many"]', "--method.rank must be a whole number, not 'many'"),
    ('"method.name" = ["lara"]', "did you mean lora"),
    ('"train.seed" = [0, -1]', "seed=-1 must be from 0"),
    ('"train.seed" = 3', "train.seed must be a list of values, not 3"),
    ('"method.rank" = [2, 2]', "has a value twice"),
    ('"base" = ["nowhere-at-all"]', "nowhere-at-all"),
    ("", "nothing varies"),
]


@pytest.mark.parametrize(("swept", "sentence"), MISTAKES, ids=[sentence for _, sentence in MISTAKES])
def test_a_mistake_is_one_sentence_before_anything_begins(
    place: Path, swept: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(place, swept=swept)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lorakit: ") and sentence in error
    assert not (place / "out").exists()


def test_the_settings_of_a_sweep_are_flags_and_keys(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(place, "--by", "loss", top="at_once = 1\npick = 3")) == 0
    told = capsys.readouterr().out
    assert "3 of 3 runs, by loss" in told
    assert main(command(place, "--on", "nowhere")) == 2
    assert "--on must be one of here, ray, not 'nowhere'" in capsys.readouterr().err
    assert main(["sweep", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "adapters that are trained on one base at once" in shown and "--train.learning_rate" in shown


def test_the_example_declares_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = runs_of(["sweep", "--config", str(EXAMPLE), "--out", str(tmp_path)], monkeypatch)
    told = tomllib.loads(EXAMPLE.read_text())
    assert len(runs) == 3 * 3 * 2 and "# A run as `lorakit train --config` reads it" in EXAMPLE.read_text()
    run = runs["rank=16,learning_rate=0.002,seed=1"]
    assert (run.base, run.data.source, run.train.evaluate_every) == (told["base"], "reviews", 40)
    assert (run.train.learning_rate, run.train.seed) == (2e-3, 1)
