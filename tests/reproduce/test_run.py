"""What a run leaves behind when it ends, when it is stopped, and when it is resumed."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.cli._adapter import loaded
from lorakit.data import Dataset, Example
from lorakit.errors import BadData, BadMethod, BadModel, MissingPackage, OutputExists
from lorakit.methods.prefix_embedding import PrefixEmbedding
from lorakit.models import load
from lorakit.reproduce import run as module
from lorakit.reproduce.measures import Evaluate
from lorakit.reproduce.rehearsal import rehearse
from lorakit.reproduce.run import Run, carry_out, feed
from lorakit.train import Train, planner
from tests.reproduce import small
from tests.tiny import tiny


@pytest.fixture
def declared(tmp_path: Path) -> Run:
    small.write(tmp_path)
    return small.declared(tmp_path, train=Train(steps=6, batch_size=4))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop_after(count: int) -> Any:
    def wrap(steps: Any) -> Any:
        for step in steps:
            yield step
            if step.step == count:
                steps.throw(KeyboardInterrupt())

    return wrap


def test_the_adapter_is_saved_before_it_is_measured(declared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(model: Any, tokenizer: Any, data: Any, settings: Any, sides: Any) -> Any:
        if "adapter" in sides:
            raise KeyboardInterrupt
        return {"base": {"accuracy": 0.5}}

    out = Path(declared.out)
    with monkeypatch.context() as patched:
        patched.setattr(module, "compare", compare)
        with pytest.raises(KeyboardInterrupt):
            carry_out(declared)
    assert {"adapter_model.safetensors", "loss.png", "run.json", "metrics.jsonl"} <= contents(out).keys()
    assert not (out / "results.json").exists()
    saved = (out / "adapter_model.safetensors").read_bytes()
    found = carry_out(declared, resume=True).results
    assert found["steps"] == 6 and 0 <= found["adapter"]["accuracy"] <= 1
    assert (out / "adapter_model.safetensors").read_bytes() == saved


def test_a_finished_run_keeps_all_it_has_when_it_is_resumed(declared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = carry_out(declared)
    before = contents(Path(declared.out))
    monkeypatch.setattr(module, "compare", None)  # nothing is measured again
    assert carry_out(declared, resume=True).results == whole.results
    assert contents(Path(declared.out)) == before


def test_the_results_of_a_resumed_run_are_those_of_all_its_steps(declared: Run) -> None:
    whole = carry_out(replace(declared, out=f"{declared.out}-whole")).results
    with pytest.raises(Exception, match="stopped after step 4"):
        carry_out(declared, wrap=stop_after(4))
    shutil.move(declared.out, f"{declared.out}-moved")
    moved = replace(declared, out=f"{declared.out}-moved")
    found = carry_out(moved, resume=True).results
    rows = [json.loads(line) for line in (Path(moved.out) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert found["train_seconds"] == pytest.approx(sum(row["seconds"] for row in rows), abs=0.01)
    assert (found["steps"], found["loss"], found["adapter"]) == (6, whole["loss"], whole["adapter"])


def test_the_data_is_read_once(declared: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "test.csv").write_text("text,verdict\na film 1,bad\na film 2,good\n")
    data = replace(declared.data, test=str(tmp_path / "test.csv"))
    with caplog.at_level(logging.WARNING):
        module.prepare(replace(declared, base=str(tmp_path / "encoder"), data=data))
    assert caplog.text.count("are left out") == 1


def test_a_prefix_that_leaves_room_for_an_example_is_trained(declared: Run) -> None:
    short = replace(declared, train=Train(steps=1, batch_size=4))
    whole, none = (replace(short, out=f"{short.out}-{n}", method=PrefixEmbedding(prefix=n)) for n in (59, 63))
    assert carry_out(whole).results["steps"] == 1
    with pytest.raises(BadMethod, match="has 64 positions in all, which leaves 1 for an example"):
        carry_out(none)
    assert not Path(none.out).exists()


def test_a_prefix_leaves_one_token_of_text_beside_the_special_ones() -> None:
    model, tokenizer = load("minilm-l6", labels=2)
    data = Dataset("two", [Example("a fine film", "", 1), Example("a bad film", "", 0)], [], labels=("bad", "good"))
    encoded = feed(model, tokenizer, data, Train(), PrefixEmbedding(prefix=509)).examples
    assert [tokenizer.decode(example.ids, skip_special_tokens=True) for example in encoded] == ["a", "a"]
    for prefix, left in ((510, "2"), (511, "1"), (512, "none"), (600, "none")):
        with pytest.raises(BadMethod, match=f"leaves {left} for an example; it needs 3 or more"):
            feed(model, tokenizer, data, Train(), PrefixEmbedding(prefix=prefix))
    with pytest.raises(BadData, match="max_length=2 leaves no token of text"):  # which no shorter prefix would mend
        feed(model, tokenizer, data, Train(max_length=2), PrefixEmbedding(prefix=5))


def test_a_base_is_loaded_again_as_it_was_in_training(declared: Run) -> None:
    carry_out(replace(declared, dtype="bfloat16"))
    model, _, _ = loaded(Path(declared.out), None)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("quantise", ["int8", "int4"])
def test_a_run_over_a_base_in_few_bits_is_measured_over_it(declared: Run, quantise: str) -> None:
    outcome = carry_out(replace(declared, quantise=quantise))
    assert outcome.model.model.layers[0].mlp.up_proj.is_packed
    model, _, _ = loaded(Path(declared.out), None)
    assert model.model.layers[0].mlp.up_proj.is_packed


def test_where_memory_does_not_suffice_passes_are_shorter_and_it_is_said(
    declared: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = module.ready(*module.prepare(declared), declared)
    whole = module.forecast(made, declared)
    assert module.fitted(made, declared) is declared.train
    monkeypatch.setattr(planner, "machine_named", lambda *given: replace(whole.machine, memory_bytes=0))
    with caplog.at_level(logging.WARNING):
        chosen = module.fitted(made, declared)
    assert chosen.checkpointing == "blocks" or chosen.forward_tokens < declared.train.batch_size * 20
    assert caplog.text


@pytest.mark.parametrize("devices", [0, 2])
def test_where_passes_may_stay_and_devices_lack_that_is_said_too(
    devices: int, declared: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = module.ready(*module.prepare(declared), declared)
    whole = module.forecast(made, declared)
    lacking = replace(whole, choice=replace(whole.choice, devices=devices, why="Take more devices."))
    monkeypatch.setattr(module, "forecast", lambda *given: lacking)
    assert module.fitted(made, declared) is declared.train
    assert caplog.messages == ["Take more devices."]


def test_an_encoder_with_a_decoder_is_refused_before_anything_is_measured(declared: Run) -> None:
    _, tokenizer, data = module.prepare(declared)
    with pytest.raises(BadModel, match="T5ForConditionalGeneration reads by an encoder and writes by a decoder"):
        next(module.adapting(tiny("t5"), tokenizer, data, declared))


def test_what_a_finished_run_does_not_take_over_is_named(declared: Run, caplog: pytest.LogCaptureFixture) -> None:
    carry_out(declared)
    moved = replace(declared, out=shutil.move(declared.out, f"{declared.out}-moved"))
    carry_out(moved, resume=True)
    assert not caplog.text
    carry_out(replace(moved, evaluate=Evaluate(batch_size=3), track="none", calibrate_on=3), resume=True)
    assert "whose results stay as they are; not applied: evaluate.batch_size, calibrate_on" in caplog.text


@pytest.mark.parametrize("begin", [carry_out, rehearse])
def test_a_folder_that_cannot_hold_the_run_is_refused_before_the_base_is_loaded(
    begin: Any, declared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(out: object, sentence: str) -> None:
        with pytest.raises(OutputExists, match=sentence):
            begin(replace(declared, out=str(out), base="no such base"))

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    refused(tmp_path / "run", "holds another run")
    refused(tmp_path / "rows.csv" / "below" / "it", "rows.csv is no folder; choose another")
    refused("/", "--out / cannot hold a run: the adapter bears the folder's name, and this one has none")
    monkeypatch.setattr(os, "access", lambda place, how: Path(place) != tmp_path)
    refused(tmp_path / "new" / "run", "may not be written")


def test_a_dry_run_asks_for_the_package_of_a_service(declared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.train.track.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install wandb"):
        rehearse(replace(declared, track="wandb"))
