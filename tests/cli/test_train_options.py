"""What `lorakit train` offers beside training: a dry run, early stopping, the best state, tracking."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from lorakit.cli import _show, main, train
from lorakit.data import Encoded
from lorakit.reproduce.rehearsal import Shown, _shown, rehearse
from lorakit.reproduce.run import carry_out
from lorakit.train import Feed, Train
from tests.data.conftest import made
from tests.reproduce import small


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    small.write(folder)
    return folder


def words(place: Path, *more: str, base: str = "base") -> list[str]:
    told = ["train", "--base", str(place / base), "--data", str(place / "rows.csv"), "--data.context", "text"]
    return [*told, "--data.label", "verdict", "--train.steps", "3", "--train.batch_size", "4", *more]


def files(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_a_dry_run_shows_plan_and_first_batch_and_writes_nothing(
    place: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(place)
    more = ["--train.evaluate_every", "1", "--evaluate.held_out", "6", "--out", str(place / "dry")]
    assert main(words(place, flag, *more)) == 0
    assert files(place) == before and not (place / "dry").exists()
    told = capsys.readouterr().out
    assert "LlamaForCausalLM" in told and "attn.q" in told and "1,792 trained" in told
    plan = dict(line.strip().rsplit(maxsplit=1) for line in told.splitlines() if line.startswith(" ") and line.strip())
    assert plan["examples to train on"] == "30" and plan["examples held out to evaluate on"] == "6"
    assert plan["steps"] == "3" and plan["examples in a batch"] == "4" and plan["epochs"] == "0.375"
    shown = told[told.index("The first batch: 4 examples") :]
    learned = [line.split("[[")[1] for line in shown.splitlines() if " film " in line]
    assert len(learned) == 4 and set(learned) <= {" good<|end|>]]", " bad<|end|>]]"}
    assert "not acted" not in told


def test_the_batch_that_is_shown_is_the_first_that_is_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, read = small.declared(place, "read", train=Train(steps=1, batch_size=4)), []
    shown = [example.read + example.learned for example in rehearse(run).batch]
    plan = Feed.plan

    def watched(feed: Feed, settings: Train, done: int) -> Iterator[list[list[int]]]:
        for batches in plan(feed, settings, done):
            read.extend(made().decode(feed.examples[each].ids) for each in batches[0])
            yield batches

    monkeypatch.setattr(Feed, "plan", watched)
    carry_out(run)
    assert shown == read and len(shown) == 4


def test_a_classifier_learns_the_label_that_is_marked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(place, "--dry-run", "--out", str(place / "dry"), base="encoder")) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if " film " in line]
    assert len(shown) == 4
    assert all(line.endswith("[[good]]" if "good film" in line else "[[bad]]") for line in shown)


def test_what_is_learned_is_coloured_where_there_is_colour(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for shown in (train, _show):
        monkeypatch.setattr(shown, "console", Console(force_terminal=True, color_system="standard", markup=False))
    assert main(words(place, "--dry-run", "--out", str(place / "dry"))) == 0
    told = capsys.readouterr().out
    assert "\x1b[1;32m good<|end|>\x1b[0m" in told and "[[" not in told


def test_no_text_is_lost_where_the_two_parts_meet() -> None:
    tokenizer = made()
    ids = tuple(tokenizer("a fine film é good").input_ids)
    for start in range(1, len(ids)):
        found = _shown(Encoded(ids, start), tokenizer, ())
        assert found.tokens == len(ids) and found.labelled == len(ids) - start
        if "�" not in found.read:  # a letter of several tokens is divided
            assert found.read + found.learned == "a fine film é good"
    assert _shown(Encoded(ids, len(ids), label=1), tokenizer, ("bad", "good")) == Shown(
        "a fine film é good", "good", len(ids), 1
    )


def test_a_mistake_is_found_in_a_dry_run_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(place, "--dry-run", "--out", "o", "--method.targets", "attn.quarry")) == 2
    assert "did you mean attn.q" in capsys.readouterr().err


def test_a_run_stops_early_and_keeps_the_best_by_flags_and_by_a_file(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run.toml").write_text(
        'keep = "best"\n[train]\npatience = 1\nevaluate_every = 2\nlearning_rate = 0.5\nsteps = 20\n'
        "[evaluate]\nheld_out = 8\n"
    )
    flags = ["--keep", "best", "--train.patience", "1", "--train.evaluate_every", "2", "--train.learning_rate", "0.5"]
    flags += ["--train.steps", "20", "--evaluate.held_out", "8"]
    told = words(place, base="encoder")
    without_steps = [word for word in told if word not in ("--train.steps", "3")]
    with caplog.at_level(logging.WARNING):
        assert main([*without_steps, *flags, "--out", str(place / "by-flags")]) == 0
        assert main([*without_steps, "--config", str(tmp_path / "run.toml"), "--out", str(place / "by-file")]) == 0
    one, other = (json.loads((place / out / "results.json").read_text()) for out in ("by-flags", "by-file"))
    assert one["steps"] == other["steps"] < 20 and one["kept_step"] == other["kept_step"] < one["steps"]
    assert caplog.text.count("stopped after step") == 2


BAD = [
    (["--keep", "best"], "keep='best' must be last where train.evaluate_every is 0"),
    (["--train.patience", "3"], "train.patience=3 must be 0 where train.evaluate_every is 0"),
    (["--train.patience", "-1"], "patience=-1 must be 0 or more"),
    (["--track", "wandbb"], "--track must be one of none, tensorboard, mlflow, wandb, trackio, not 'wandbb'"),
    (["--train.evaluate_every", "1"], "evaluate.held_out=128 is more than half of the 36 training examples"),
    (["--train.evaluate_every", "1", "--evaluate.held_out", "0"], "held_out=0 must be at least 1"),
]


@pytest.mark.parametrize(("more", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_a_mistake_is_one_sentence(
    place: Path, more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(place, "--out", str(place / "new"), *more)) == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (place / "new").exists()


def test_a_missing_package_is_told_before_anything_is_loaded(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.train.track.find_spec", lambda name: None)
    assert main(words(place, "--out", str(place / "new"), "--track", "trackio")) == 2
    assert "pip install trackio" in capsys.readouterr().err
    assert not (place / "new").exists()


def test_the_field_tracks_the_run_under_the_name_of_its_folder(place: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(words(place, "--out", str(place / "tracked"), "--track", "tensorboard")) == 0
    assert json.loads((place / "tracked" / "tracked.json").read_text()) == {"tensorboard": "tracked"}
    events = EventAccumulator(str(place / "tracked")).Reload()
    assert [each.step for each in events.Scalars("loss")] == [1, 2, 3]
    assert b"train.batch_size = 4" in events.Tensors("run/text_summary")[0].tensor_proto.string_val[0]
    before = files(place / "tracked")
    assert main(words(place, "--out", str(place / "tracked"), "--track", "tensorboard", "--resume")) == 0
    assert files(place / "tracked") == before
