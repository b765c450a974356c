"""`lorakit plan`: what it prints, for models with and without weights, and one sentence for each mistake."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import lorakit as lk
from lorakit.cli import main
from lorakit.cli._declare import parse
from lorakit.errors import BadModel
from lorakit.models import quantise
from lorakit.models.quantise import Width
from lorakit.reproduce.planning import SHAPES, without_values
from lorakit.reproduce.run import Run
from lorakit.train import Train
from tests.tiny import tiny

GPT3 = ["plan", "--base", "gpt3-175b", "--method.rank", "4", "--method.targets", "attn.q,attn.v", "--machine", "h100"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with configs, and no weights."""
    folder = tmp_path_factory.mktemp("plan")
    for name, family in (("base", "llama"), ("encoder", "bert"), ("both", "t5")):
        model = tiny(family, **({} if family == "t5" else {"max_position_embeddings": 512}))
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder / name)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    return folder


def test_the_table_says_bytes_operations_and_what_was_chosen(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--base", str(place / "base"), "--machine", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "LlamaForCausalLM, 19,616 numbers; lora trains" in told
    assert all(row in told for row in ("weights", "gradients", "AdamW's moments", "saved file", "kept of a token"))
    assert "One device suffices, within" in told
    assert f"train --base={place / 'base'} --method.name=lora --data ... --out ..." in told


ASKED = ["--train.batch_size=3", "--train.forward_tokens=100", "--train.checkpointing=blocks", "--quantise=int8",
         "--method.name=dora", "--method.rank=2", "--method.targets=attn.q,attn.v", "--dtype=bfloat16"]  # fmt: skip


def test_the_command_trains_what_was_planned(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--base", str(place / "base"), "--machine", "h100", "--train.max_length", "64", *ASKED]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].split(" train ")[1])
    run = parse(Run, "train", "", [*words[: words.index("--data")], "--data", "d", "--out", "o"])
    assert run.train == Train(batch_size=3, max_length=64, forward_tokens=100, checkpointing="blocks")
    assert run.method == lk.DoRA(rank=2, targets=("attn.q", "attn.v"))
    assert (run.base, run.quantise, run.dtype) == (str(place / "base"), "int8", "bfloat16")


def test_there_is_no_command_for_what_cannot_be_trained(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["base/config.json"], ["base", "--dtype", "float16", "--machine", "h100"]):
        assert main(["plan", "--base", str(place / words[0]), *words[1:]]) == 0
    told = capsys.readouterr().out
    assert told.count("One device suffices") == 2 and " train --base" not in told


@pytest.mark.parametrize("width", ["int8", "int4"])
def test_a_base_in_few_bits_is_planned_with_the_bytes_that_it_takes(
    width: Width, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--machine", "h100", "--dtype", "float32", "--json"]
    assert main(["plan", "--base", str(place / "base"), "--quantise", width, *flags]) == 0
    told, model = json.loads(capsys.readouterr().out), tiny("llama", max_position_embeddings=512)
    assert told["parameters"] == sum(p.numel() for p in model.parameters())
    quantise(model, width)
    assert told["bytes"]["weights"] == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert told["kept"]["source"] == "probe"


@pytest.mark.parametrize("base", ["base", "base/config.json"])
def test_json_holds_the_same_numbers_for_a_folder_and_its_config(
    base: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--json", "--machine", "t4", "--tokens.mean", "100", "--train.batch_size", "3", "--train.accumulate", "2"]
    assert main(["plan", "--base", str(place / base), *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == sum(p.numel() for p in tiny("llama").parameters())
    assert told["bytes"]["weights"] == pytest.approx(2 * told["parameters"], rel=0.01)
    assert told["step_tokens"] == 600
    assert told["choice"]["forward_tokens"] == 3 * 512
    assert told["machine"]["name"] == "t4"


def test_a_model_that_writes_nothing_gets_a_head_that_is_trained(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--base", str(place / "encoder"), "--labels", "5", "--machine", "t4", "--json"]) == 0
    five = json.loads(capsys.readouterr().out)
    assert main(["plan", "--base", str(place / "encoder"), "--machine", "t4", "--json"]) == 0
    two = json.loads(capsys.readouterr().out)
    assert five["model"] == "BertForSequenceClassification"
    assert five["trainable"] - two["trainable"] == 3 * 33


@pytest.mark.slow
def test_a_model_of_175_billion_is_planned_without_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GPT3, "--train.max_length", "2048"]) == 0
    told = capsys.readouterr().out
    assert "175,221,817,344 numbers; lora trains 18,874,368 (0.011%)" in told
    assert "350.4 GB" in told
    assert "Share the base out over" in told
    assert " train --base" not in told
    assert main([*GPT3, "--dtype", "float16", "--trained_bytes", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"]["trained"] == 37_748_736


def test_shapes_are_configs_that_transformers_knows() -> None:
    for name, fields in SHAPES.items():
        assert AutoConfig.for_model(**fields).architectures is None
        assert without_values(name, torch.float16).dtype == torch.float16


BAD: list[tuple[list[str], str]] = [
    (["--base", "{place}/nowhere"], "there is no model {place}/nowhere; among what is beside it"),
    (["--base", "gpt3"], "a plan can also be made for gpt3-175b"),
    (["--base", "{place}/broken"], "no model can be built from the config of {place}/broken"),
    (["--base", "{place}/base", "--machine", "h10"], "there is no machine called 'h10'; did you mean h100"),
    (["--base", "{place}/base", "--machine", "cuda"], "there is no CUDA device here"),
    (["--base", "{place}/base", "--method.rank", "99"], "rank 99 is above the matrix of model.layers.0"),
    (["--base", "{place}/base", "--method.targets", "atn.q"], "did you mean attn.q"),
    (["--base", "{place}/base", "--tokens.labelled", "2"], "labelled=2.0 must be above 0, at most 1"),
    (["--base", "{place}/base", "--tokens.mean", "0"], "mean=0.0 must be at least 1"),
    (["--base", "{place}/base", "--train.batch_size", "0"], "batch_size=0 must be at least 1"),
    (["--base", "{place}/base", "--trained_bytes", "0"], "trained_bytes=0 must be at least 1"),
    (["--base", "{place}/base", "--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16"),
    (["--base", "{place}/base", "--tokens.mean", "9", "--tokens.longest", "8"], "mean=9.0 must be at most longest=8"),
    (["--base", "{place}/both"], "T5ForSequenceClassification reads by an encoder and writes by a decoder"),
    ([], "base is not given"),
]


@pytest.mark.parametrize(("words", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_a_mistake_is_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", *(word.format(place=place) for word in words)]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("lorakit: ") and told.err.count("\n") == 1
    assert sentence.format(place=place) in told.err
    assert not told.out


def test_a_config_of_a_type_that_transformers_does_not_know_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(BadModel, match="no-such-model"):
        without_values(str(tmp_path), torch.float32)
