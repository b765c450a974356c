"""Evaluation during training: what is held out, what it measures, when a run stops, and which state it keeps."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import lorakit as lk
from lorakit.core.state import adapter_tensors
from lorakit.data import Example, open_data
from lorakit.errors import BadData, LorakitError, MissingPackage
from lorakit.reproduce import run as module
from lorakit.reproduce.held_out import hold_out
from lorakit.reproduce.measures import Evaluate, mean_loss
from lorakit.reproduce.run import LOSS, carry_out, prepare, ready
from lorakit.train import Train
from lorakit.train.best import best, evaluated
from lorakit.train.metrics import read
from tests.reproduce import small

ADAPTER = "adapter_model.safetensors"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    small.write(folder)
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The folder of a run that was never stopped."""
    carry_out(small.evaluated(place, "whole"))
    return place / "whole"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_context_stands_on_both_sides() -> None:
    examples = [Example(f"restaurant {n // 8}", f" text {n}") for n in range(400)]
    train, held = hold_out(examples, 40)
    assert len(held) == 40 and len(train) == 360
    assert not {example.context for example in train} & {example.context for example in held}
    assert hold_out(examples[::-1], 40)[1] == held[::-1]  # decided by the texts alone


def test_where_contexts_are_prompts_no_target_stands_on_both_sides() -> None:
    examples = [Example(f"Write a {('good', 'bad')[n % 2]} review.", f" text {n // 2}") for n in range(100)]
    train, held = hold_out(examples, 20)
    assert len(held) == 20 and {example.context for example in held} == {example.context for example in train}
    assert not {example.target for example in train} & {example.target for example in held}


@pytest.mark.parametrize(("contexts", "count", "sentence"), [(20, 11, "more than half"), (1, 2, "have one context")])
def test_what_cannot_be_held_out_is_a_sentence(contexts: int, count: int, sentence: str) -> None:
    with pytest.raises(BadData, match=sentence):
        hold_out([Example(f"text {n % contexts}", " good", label=1) for n in range(20)], count)


def test_training_reads_neither_what_is_held_out_nor_what_is_tested(place: Path) -> None:
    run = small.evaluated(place, "unused")
    model, tokenizer, data = prepare(run)
    made = ready(model, tokenizer, data, run)
    held, trained = ({example.ids for example in some} for some in (made.held_out, made.examples.examples))
    everything = {tuple(tokenizer(example.context).input_ids) for example in data.train}
    assert len(held) == 8 and not held & trained and held | trained == everything
    tested = {tuple(tokenizer(example.context).input_ids) for example in data.test}
    assert tested and not tested & (held | trained)


@pytest.mark.parametrize("base", ["base", "encoder"])
def test_the_held_out_loss_is_the_models_own(place: Path, base: str) -> None:
    run = small.evaluated(place, "unused", base=str(place / base))
    model, tokenizer, data = prepare(run)
    made = ready(model, tokenizer, data, run)
    found = mean_loss(model, made.held_out, tokenizer.pad_token_id, batch_size=3)
    losses, model = [], model.eval()
    for example in made.held_out:  # one at a time, so that nothing is padded
        logits = model(torch.tensor([example.ids])).logits[0]
        if base == "encoder":
            losses.append(F.cross_entropy(logits, torch.tensor(example.label)))
        else:
            wanted = torch.tensor(example.ids[example.start :])
            losses += F.cross_entropy(logits[example.start - 1 : -1], wanted, reduction="none")
    assert found == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_without_evaluations_a_run_is_as_it_was(place: Path) -> None:
    outcome = carry_out(small.declared(place, "plain", train=Train(steps=4, batch_size=4)))
    assert not {LOSS, "kept_step"} & outcome.results.keys()
    assert not (place / "plain" / "best").exists() and not (place / "plain" / "tracked.json").exists()
    assert all(row["evaluation"] is None for row in read(place / "plain"))
    assert len(open_data(small.declared(place).data).train) == 36


def test_a_run_stops_early_and_saves_its_best_state(whole: Path, place: Path) -> None:
    rows, results = read(whole), json.loads((whole / "results.json").read_text())
    assert [row["step"] for row in rows if row["evaluation"]] == [2, 4, 6, 8] and rows[-1]["step"] == 8
    assert results["kept_step"] == best(evaluated(whole)).step == 4 and results["steps"] == 8
    assert results[LOSS] == rows[3]["evaluation"][LOSS]
    assert (whole / ADAPTER).read_bytes() == (whole / "best" / ADAPTER).read_bytes()
    run = small.evaluated(place, "as-declared")
    made = ready(*prepare(run), run)
    lk.load(made.model, whole, "saved")
    assert mean_loss(made.model, made.held_out, made.tokenizer.pad_token_id, 8) == pytest.approx(
        results[LOSS], rel=1e-6
    )


def test_the_last_state_is_saved_where_the_best_is_not_asked_for(whole: Path, place: Path) -> None:
    outcome = carry_out(small.evaluated(place, "last", keep="last"))
    rows = read(whole)
    assert outcome.results["kept_step"] == 8 and outcome.results[LOSS] == rows[-1]["evaluation"][LOSS]
    assert (place / "last" / ADAPTER).read_bytes() != (whole / ADAPTER).read_bytes()
    assert not (place / "last" / "best").exists()


def child(place: Path, out: str, stdin: int, *flags: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.reproduce.child", str(place), out, *flags]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=stdin, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_run_stops_at_the_same_step_with_the_same_best_bytes(whole: Path, place: Path) -> None:
    fatal = random.SystemRandom().randrange(1, 9)
    with child(place, "killed", subprocess.DEVNULL) as killed:
        assert killed.stdout is not None
        while int(killed.stdout.readline()) < fatal:
            pass
        os.kill(killed.pid, signal.SIGKILL)
    outcome = carry_out(small.evaluated(place, "killed"), resume=True)
    found, wanted = contents(place / "killed"), contents(whole)
    for name in (ADAPTER, f"best/{ADAPTER}"):
        assert found[name] == wanted[name], f"killed after step {fatal}"
    assert [row["step"] for row in read(place / "killed")] == list(range(1, 9))
    assert outcome.results["kept_step"] == 4


def test_a_run_that_stopped_early_is_not_trained_again(
    whole: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = json.loads((whole / "results.json").read_text())
    before = contents(whole)
    with monkeypatch.context() as patched:
        patched.setattr(module, "compare", None)  # nothing is measured again
        outcome = carry_out(small.evaluated(place, "whole"), resume=True)
    assert outcome.results == results and contents(whole) == before
    kept = lk.load(outcome.model, whole / "best", "kept")
    ours, theirs = (adapter_tensors(outcome.model, name) for name in (outcome.name, kept))
    assert all(value.equal(theirs[key.replace(outcome.name, kept)]) for key, value in ours.items())
    (whole / "results.json").unlink()  # killed while it was measured
    again = carry_out(small.evaluated(place, "whole"), resume=True).results
    assert again == results


def test_what_makes_no_sense_is_refused_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fields, sentence in [
        ({"keep": "best"}, "keep='best' must be last where train.evaluate_every is 0"),
        ({"keep": "bets"}, "keep='bets' must be last, or best"),
        ({"train": Train(patience=2)}, "train.patience=2 must be 0 where train.evaluate_every is 0"),
    ]:
        with pytest.raises(LorakitError, match=sentence):
            small.declared(place, **fields)
    with pytest.raises(LorakitError, match="held_out=0 must be at least 1"):
        Evaluate(held_out=0)
    monkeypatch.setattr("lorakit.train.track.find_spec", lambda name: None)
    monkeypatch.setattr(module, "prepare", None)  # the base is not even loaded
    with pytest.raises(MissingPackage, match="pip install wandb"):
        carry_out(replace(small.declared(place, "untracked"), track="wandb"))
