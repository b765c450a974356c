"""`lorakit choose` and initialisations from data, on a tiny model from a folder."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

import lorakit as lk
from lorakit.cli import main
from lorakit.errors import BadMethod, LorakitError, NoSuchTarget
from lorakit.reproduce.choosing import Question, answer, fields_of
from lorakit.reproduce.run import Run, carry_out
from lorakit.train import Train
from tests.reproduce.test_run import declared

__all__ = ["declared"]


def question(run: Run, **fields: object) -> Question:
    return Question(**{"base": run.base, "data": run.data, "budget": 600, "calibrate_on": 8, **fields})


@pytest.mark.parametrize("by", ["gradient", "variance", "nfn"])
def test_what_is_chosen_fits_the_budget_and_can_be_trained(declared: Run, by: str) -> None:
    choices = answer(question(declared, by=by))
    assert 0 < sum(choice.numbers for choice in choices) <= 600
    assert answer(question(declared, by=by)) == choices
    chosen = fields_of(choices)
    method = lk.LoRA(targets=tuple(chosen.targets), ranks=chosen.ranks)
    outcome = carry_out(replace(declared, method=method))
    assert outcome.results["trainable_parameters"] == sum(choice.numbers for choice in choices)


def test_the_command_writes_a_file_to_train_with(declared: Run, tmp_path: Path, capsys) -> None:
    out = tmp_path / "chosen.toml"
    assert main(asked(declared)) == 0
    told = capsys.readouterr().out
    assert "Ask again with --out chosen.toml" in told and " train --config chosen.toml --out " in told
    assert main(asked(declared, "--out", str(out))) == 0
    told = capsys.readouterr().out
    assert "of 500 trained numbers" in told and f" train --config {out} --out " in told
    written = tomllib.loads(out.read_text())
    assert set(written["method"]["ranks"]) == set(written["method"]["targets"])
    assert main(["train", "--config", str(out), "--train.steps", "2", "--out", str(tmp_path / "run")]) == 0
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["run"]["method"]["ranks"] == written["method"]["ranks"]


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        (dict(budget=0), BadMethod, "a budget of 0 trained numbers buys nothing"),
        (dict(targets=("embed", "norm.mlp")), BadMethod, "embed, norm.mlp hold no linear layer"),
        (dict(budget=10), BadMethod, "buys nothing: the cheapest"),
        (dict(calibrate_on=0), BadMethod, "no data to start from"),
        (dict(rank=0), BadMethod, "the largest rank of a site is 0; it has to be at least 1"),
        (dict(by="size"), BadMethod, "one of gradient, variance, nfn"),
        (dict(targets=("nothing",)), NoSuchTarget, "nothing"),
    ],
)
def test_what_cannot_be_asked_is_said_before_calibration(
    declared: Run, fields: dict, error: type, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.reproduce.calibration.calibrate", None)
    with pytest.raises(error, match=words):
        answer(question(declared, **fields))


def asked(declared: Run, *more: str) -> list[str]:
    data = ["--data", declared.data.source, "--data.context", "text", "--data.label", "verdict"]
    return ["choose", "--base", declared.base, *data, "--budget", "500", "--calibrate_on", "8", *more]


def test_the_file_declares_the_same_examples(declared: Run, tmp_path: Path) -> None:
    source = Path(declared.data.source).rename(tmp_path / "filmé 🎬\x7f.csv")
    declared = replace(declared, data=replace(declared.data, source=str(source)))
    out = tmp_path / "chosen.toml"
    settings = Train(batch_size=4, max_length=40, seed=7)
    words = [f"--train.{name}={getattr(settings, name)}" for name in ("batch_size", "max_length", "seed")]
    assert main([*asked(declared, "--out", str(out)), *words]) == 0
    written = tomllib.loads(out.read_text("utf-8"))
    assert Train(**written["train"]) == settings
    assert written["data"]["source"] == str(source)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--by", "size"), "--by must be one of gradient, variance, nfn, not 'size'; see lorakit choose --help"),
        (("--budget", "1e5x"), "--budget must be a whole number, not '1e5x'"),
    ],
)
def test_a_value_of_the_wrong_type_is_one_sentence(declared: Run, more: tuple[str, ...], words: str, capsys) -> None:
    assert main(asked(declared, *more)) == 2
    assert capsys.readouterr().err.startswith(f"lorakit: {words}")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_there_is_not_overwritten(
    declared: Run, kind: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.cli.choose.answer", None)  # not even asked
    out = tmp_path / "there"
    out.write_text("mine") if kind == "file" else out.mkdir()
    assert main(asked(declared, "--out", str(out))) == 2
    told = capsys.readouterr().err
    assert f"{out} exists already" in told if kind == "file" else f"{out} is a folder" in told
    assert out.is_dir() or out.read_text() == "mine"


@pytest.mark.parametrize("init", ["covariance-eva", "covariance-corda", "gradient", "covariance-both", "structured"])
def test_initialisations_from_data_gather_their_statistics(declared: Run, init: str) -> None:
    outcome = carry_out(replace(declared, method=lk.LoRA(rank=2, init=init), calibrate_on=16))
    assert 0 <= outcome.results["adapter"]["accuracy"] <= 1


def test_a_start_from_data_needs_data(declared: Run) -> None:
    with pytest.raises(LorakitError, match="starts from statistics of data"):
        lk.attach(carry_out(declared).model, lk.LoRA(init="covariance-eva"), name="again")
